"""Documentation out of Debian packages: fetched with apt, unpacked without installing, and read as text."""

import gzip
import html.parser
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from kan_train.config import ConfigError

PACKAGES = ("linux-doc", "anarchism", "python3-doc")


def download_packages(work: Path) -> list[str]:
    """Fetch and unpack the packages that apt offers, without installing them; returns name=version of each."""
    work.mkdir(parents=True, exist_ok=True)
    versions = []
    for package in PACKAGES:
        real = _real_package(package)
        versions.append(real)
        done = work / f"{real.replace('=', '_')}.unpacked"
        if done.exists():
            continue
        _run(["apt-get", "download", real], cwd=work)
        (archive,) = work.glob(f"{real.partition('=')[0]}_*.deb")
        _run(["dpkg-deb", "-x", archive.name, "."], cwd=work)
        archive.unlink()
        done.touch()
    return versions


def _real_package(package: str) -> str:
    """A documentation package may be a pointer to the one with the text: follow its first dependency of the kind name-N.M(-doc)."""
    shown = _run(["apt-cache", "show", "--no-all-versions", package])
    version = re.search(r"^Version: (.+)$", shown, re.M)
    if version is None:
        raise ConfigError(f"corpus=debian_docs: apt does not know the package {package}; run `apt-get update`, or use corpus=stdlib")
    depends = re.search(r"^Depends: (.+)$", shown, re.M)
    base = re.escape(package.removesuffix("-doc"))
    pointer = re.search(rf"\b({base}[\d.]+-doc|{re.escape(package)}-[\d.]+)\b", depends.group(1)) if depends else None
    return _real_package(pointer.group(1)) if pointer else f"{package}={version.group(1)}"


def _run(command: list[str], cwd: Path | None = None) -> str:
    try:
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise ConfigError(f"corpus=debian_docs needs {command[0]}, which this machine does not have; use corpus=stdlib or corpus=directory") from error
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"corpus=debian_docs: `{' '.join(command)}` failed: {error.stderr.strip()}; run `apt-get update`, or use corpus=stdlib") from error


def is_document(root: Path, path: Path) -> bool:
    """Whether `path` (below `root`) is a page of documentation, and the first of its forms.

    linux-doc has every page three times, as reStructuredText, as the source beside the HTML, and as HTML; python3-doc twice. Were all of them taken, a page
    held out for validation would be in the training text in another form.
    """
    name = path.name.removesuffix(".gz")
    if "doc" not in path.parts or not name.endswith((".html", ".rst", ".txt")) or name.startswith(("genindex", "search", "py-modindex", "changelog")):
        return False
    return not any((root / form).exists() for form in _better_forms(path))


def _better_forms(path: Path) -> Iterator[Path]:
    if "html" not in path.parts:
        return
    base = Path(*path.parts[: path.parts.index("html")])
    inside = Path(*path.parts[path.parts.index("html") + 1 :])
    if inside.parts[0] == "_sources":
        page = Path(*inside.parts[1:]).with_name(path.name.removesuffix(".gz").removesuffix(".txt").removesuffix(".rst"))
    else:
        page = inside.with_name(path.name.removesuffix(".gz").removesuffix(".html"))
        yield base / "html" / "_sources" / f"{page}.rst.txt"
    yield base / "Documentation" / f"{page}.rst"
    yield base / "Documentation" / f"{page}.rst.gz"


class _TextOfPage(html.parser.HTMLParser):
    """The readable text of a page: no scripts, no styles, no navigation; a line break after every block."""

    SKIPPED = ("script", "style", "nav", "head", "footer")
    BLOCKS = ("p", "div", "li", "pre", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "dd", "br", "section")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipping += tag in self.SKIPPED

    def handle_endtag(self, tag: str) -> None:
        self.skipping -= tag in self.SKIPPED and self.skipping > 0
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data)


def plain_text(path: Path) -> str:
    """The text of a page: HTML without its tags and navigation, other files as they are."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = content.decode("utf-8", errors="replace")
    if ".html" in path.suffixes:
        page = _TextOfPage()
        page.feed(text)
        text = re.sub(r"[ \t]+\n", "\n", "".join(page.parts))
        text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return text
