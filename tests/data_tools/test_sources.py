"""Sources: every format and compression gives the same documents; what cannot be read is refused by name."""

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from kan_train.config import ConfigError, CorpusConfig
from kan_train.data_tools.sources import open_source, read_unit

TEXTS = ["first\r\nline\n", "größer als 語 🙂\t\n", "third"]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def documents(folder: Path, **settings: object) -> list[str]:
    config = CorpusConfig(kind="directory", name="mine", path=str(folder), **settings)  # type: ignore[arg-type]
    return [document.text for unit in open_source(config, folder / "download").units for document in read_unit(config, unit)]


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kind", ["txt", "md", "jsonl"])
def test_every_format_and_compression_gives_the_documents(tmp_path: Path, kind: str, ending: str) -> None:
    if kind == "jsonl":
        lines = "\n\n".join(json.dumps({"text": text, "n": 1}, ensure_ascii=index % 2 == 0) for index, text in enumerate(TEXTS)) + "\n"
        (tmp_path / f"rows.jsonl{ending}").write_bytes(COMPRESS[ending](lines.encode()))
    else:
        for number, text in enumerate(TEXTS):
            (tmp_path / f"{number}.{kind}{ending}").write_bytes(COMPRESS[ending](text.encode()))
    assert documents(tmp_path) == TEXTS


def test_parquet_gives_its_column_of_text(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": [*TEXTS, None], "n": [1, 2, 3, 4]}), tmp_path / "rows.parquet")
    assert documents(tmp_path, text_field="body") == [*TEXTS, ""]
    assert documents(tmp_path / "rows.parquet", text_field="body") == [*TEXTS, ""], "one file instead of a folder"
    for field in ("text", "n"):
        with pytest.raises(ConfigError, match=r"rows\.parquet has no column of text.*corpus\.text_field to one of: body$"):
            documents(tmp_path, text_field=field)


def test_hidden_and_other_files_are_left_out_and_the_order_is_by_name(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", ".hidden.txt", ".git/x.txt", "image.png", "a/y.txt", "data.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    config = CorpusConfig(kind="directory", name="mine", path=str(tmp_path))
    assert [unit.name for unit in open_source(config, tmp_path).units] == ["b.txt", "a/y.txt", "a/z.txt"]


def test_a_text_of_another_encoding_is_refused_by_name_and_read_when_named(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"old\.txt is not valid utf-8 \(byte 2\).*corpus\.encoding=latin-1"):
        documents(tmp_path)
    assert documents(tmp_path, encoding="latin-1") == ["größer"]
    with pytest.raises(ConfigError, match=r"corpus\.encoding=nonsense is not an encoding"):
        documents(tmp_path, encoding="nonsense")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.bz2", "a.txt.xz", "a.txt.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(COMPRESS[Path(name).suffix](b"some text " * 10_000))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"this is plain text, whatever the name says")
    with pytest.raises(ConfigError, match=rf"{name}.*damaged"):
        documents(tmp_path)


@pytest.mark.parametrize(("line", "message"), [("{", "is not JSON lines"), ('{"body": "x"}', r"line 2 has no text.*it has: body.*corpus\.text_field"),
                                               ('{"text": 3}', "line 2 has no text"), ("[1]", "line 2 has no text")])  # fmt: skip
def test_a_row_without_text_is_refused_by_name_and_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=rf"rows\.jsonl.*{message}|{message}"):
        documents(tmp_path)


def test_a_folder_that_is_missing_or_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"corpus\.path=.*nowhere does not exist"):
        documents(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds no \.txt"):
        documents(tmp_path)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user, and only another user can be denied")
def test_a_file_that_this_user_may_not_read_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secret.txt").chmod(0o600)
    for folder in [tmp_path, *tmp_path.parents[:2]]:
        folder.chmod(0o755)
    program = (
        "import os, sys; from pathlib import Path; from kan_train.config import ConfigError, CorpusConfig\n"
        "from kan_train.data_tools.sources import open_source, read_unit\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "config = CorpusConfig(kind='directory', name='mine', path=sys.argv[1])\n"
        "try: [list(read_unit(config, unit)) for unit in open_source(config, Path('none')).units]\n"
        "except ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "secret.txt: permission denied for user 65534" in done.stdout, done.stderr


def test_the_standard_library_is_its_sources(tmp_path: Path) -> None:
    config = CorpusConfig(kind="stdlib", name="stdlib")
    source = open_source(config, tmp_path)
    names = [unit.name for unit in source.units]
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not [name for name in names if "site-packages" in name or not name.endswith(".py")]
    assert names == [unit.name for unit in open_source(config, tmp_path).units]
    unit = source.units[names.index("argparse.py")]
    (document,) = read_unit(config, unit)
    assert document.text == Path(unit.path).read_text(encoding="utf-8")
    assert source.licence == "PSF-2.0"


# --- Hugging Face ---


def test_the_missing_library_is_named_with_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    config = CorpusConfig(kind="huggingface", name="web", dataset="some/set")
    with pytest.raises(ConfigError, match=r"pip install 'kan-train\[eval\]'"):
        list(read_unit(config, open_source(config, tmp_path).units[0]))


def test_a_dataset_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load_dataset(name: str, subset: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.update(name=name, subset=subset, split=split, streaming=streaming)
        if name == "no/such":
            raise FileNotFoundError("it is not there")
        return [{"content": text} for text in TEXTS]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    config = CorpusConfig(kind="huggingface", name="web", dataset="some/set", subset="small", text_field="content")
    source = open_source(config, tmp_path)
    assert [document.text for document in read_unit(config, source.units[0])] == TEXTS
    assert asked == {"name": "some/set", "subset": "small", "split": "train", "streaming": True}
    config.text_field = "text"
    with pytest.raises(ConfigError, match=r"some/set, row 0 has no text.*it has: content"):
        list(read_unit(config, source.units[0]))
    config.dataset = "no/such"
    with pytest.raises(ConfigError, match=r"corpus\.dataset=no/such cannot be streamed \(it is not there\)"):
        list(read_unit(config, source.units[0]))


# --- Debian ---


def test_a_machine_without_apt_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"corpus=debian_docs needs apt-cache.*corpus=stdlib"):
        open_source(CorpusConfig(kind="debian_docs", name="debian_docs"), tmp_path / "download")


PAGE = (
    "<html><head><title>T</title><style>p{}</style></head><body><nav>menu</nav>"
    "<h1>Head &amp; tail</h1><p>One <b>bold</b> line.</p><script>x()</script></body></html>"
)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds Debian packages with dpkg-deb")
def test_debian_packages_are_fetched_unpacked_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against an archive of our own: pointer packages are followed to the ones with the text, and nothing is installed."""
    archive, tools = tmp_path / "archive", tmp_path / "tools"
    archive.mkdir()
    tools.mkdir()
    docs = {
        "linux-doc-6.1": {"Documentation/a/page.rst.gz": gzip.compress(b"The source.\n"), "html/a/page.html": PAGE.encode(),
                          "html/_sources/a/page.rst.txt": b"The source.\n", "Documentation/notes.txt.gz": gzip.compress(b"Notes.\n")},
        "anarchism": {"html/faq.html.gz": gzip.compress(PAGE.encode())},
        "python3.11-doc": {"html/a.html": b"<p>Doc.</p>", "html/_sources/a.rst.txt": b"Doc, its source.\n", "html/genindex.html": b"<p>x</p>"},
    }  # fmt: skip
    for package, files in docs.items():
        tree = tmp_path / "tree" / package
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN" / "control").write_text(f"Package: {package}\nVersion: 1.0-1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n")
        for name, content in {**files, "changelog.txt": b"left out"}.items():
            file = tree / "usr/share/doc" / package / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        subprocess.run(["dpkg-deb", "--build", tree, archive / f"{package}_1.0-1_all.deb"], check=True, capture_output=True)
    (tools / "apt-cache").write_text(
        '#!/bin/sh\necho "Version: 1.0-1"\ncase "$3" in linux-doc) echo "Depends: linux-doc-6.1";; python3-doc) echo "Depends: python3.11-doc, x";; esac\n'
    )
    (tools / "apt-get").write_text(f'#!/bin/sh\ncp {archive}/"${{2%%=*}}"_*.deb .\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    config = CorpusConfig(kind="debian_docs", name="debian_docs")
    for _ in range(2):  # the second time nothing is fetched
        source = open_source(config, tmp_path / "download")
        shutil.rmtree(archive, ignore_errors=True)
        assert source.description == "Debian packages linux-doc-6.1=1.0-1, anarchism=1.0-1, python3.11-doc=1.0-1"
        assert "GPL-2.0" in source.licence
        texts = sorted(document.text for unit in source.units for document in read_unit(config, unit))
        assert texts == ["Doc, its source.\n", "Head & tail\nOne bold line.\n", "Notes.\n", "The source.\n"], "each page once, whatever its forms"
