"""What an image's recipe must keep, beyond what hadolint looks at: `python docker/lint.py` prints each breach, and leaves with 1 if there is one.

A base with a version, an end that is not root, sources that exist and that .dockerignore lets in, every package pinned, pins that satisfy pyproject.toml,
every room of the package in the image, labels that tell the truth, no setting of this machine.
"""

import fnmatch
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

RECIPES = {"docker/Dockerfile": ("docker/constraints-cuda.txt", "gpu"), "docker/Dockerfile.cpu": ("docker/constraints-cpu.txt", None)}
LABELS = ("title", "description", "version", "licenses", "revision")
MACHINE = re.compile(r"(?i)\b(pip_\w+|password|token|\w*proxy|secret)\b")


@dataclass
class Recipe:
    """A Dockerfile as instructions, and the folder that it is built from."""

    root: Path
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        lines = [line for line in (self.root / self.name).read_text().splitlines() if not line.lstrip().startswith("#")]
        for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
            if line.strip():
                instruction, _, rest = line.strip().partition(" ")
                self.steps.append((instruction.upper(), " ".join(rest.split())))

    def all(self, instruction: str) -> list[str]:
        """What follows `instruction`, in the order of the file."""
        return [rest for name, rest in self.steps if name == instruction]

    def copied(self) -> list[str]:
        """Paths that come from the build's folder, not from another stage."""
        return [word for rest in self.all("COPY") if "--from=" not in rest for word in rest.split()[:-1] if not word.startswith("--")]


def breaches(root: Path, name: str) -> list[str]:
    """Everything wrong with one recipe, in words."""
    recipe, (pins, extra) = Recipe(root, name), RECIPES[name]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    found = [*_base(recipe), *_user(recipe), *_sources(recipe, project), *_packages(recipe, pins), *_labels(recipe, project), *_machine(recipe)]
    return [f"{name}: {one}" for one in found] + [f"{pins}: {one}" for one in pin_breaches((root / pins).read_text(), project, extra)]


def pin_breaches(text: str, project: dict, extra: str | None) -> Iterator[str]:
    """Lines that are no pins, and requirements of pyproject.toml that the pins do not satisfy."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    for line in lines:
        if not re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.+!]+", line):
            yield f"{line!r} is no pin; generate the file again: python docker/pin.py"
    pinned = dict(line.split("==") for line in lines if "==" in line)
    if len(pinned) < len(lines) or list(pinned) != sorted(pinned):
        yield "a package stands twice, or out of order"
    section = project["project"]
    for requirement in map(Requirement, section["dependencies"] + (section["optional-dependencies"][extra] if extra else [])):
        version = pinned.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            yield f"pyproject.toml asks for {requirement}, which {requirement.name}=={version} is not; generate the file again: python docker/pin.py"


def _base(recipe: Recipe) -> Iterator[str]:
    defaults = dict(rest.split("=", 1) for rest in recipe.all("ARG") if "=" in rest)
    stages = {rest.split(" AS ")[1] for rest in recipe.all("FROM") if " AS " in rest}
    if len(recipe.all("FROM")) < 2:
        yield "one stage: build in a first one, so that its tools stay out of the image"
    for rest in recipe.all("FROM"):
        image = re.sub(r"\$\{(\w+)\}", lambda match: defaults.get(match[1], ""), rest.split()[0])
        tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
        if image not in stages and (not re.search(r"\d", tag) or tag == "latest"):
            yield f"FROM {rest}: {image or 'nothing'} has no version; write image:version"


def _user(recipe: Recipe) -> Iterator[str]:
    final = recipe.steps[max(index for index, (name, _) in enumerate(recipe.steps) if name == "FROM") :]
    users = [rest for name, rest in final if name == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        yield f"ends as USER {users[-1] if users else 'root'}; use a number above 0, such as USER 10001:10001"
    for name in ("ENTRYPOINT", "CMD"):
        if not all(rest.startswith("[") for rest in recipe.all(name)):
            yield f"{name} runs in a shell, which would not pass signals on; write it as a list"
    if not recipe.all("ENTRYPOINT"):
        yield "no ENTRYPOINT"


def _sources(recipe: Recipe, project: dict) -> Iterator[str]:
    if recipe.all("ADD"):
        yield "ADD unpacks and downloads; use COPY"
    ignore = (recipe.root / ".dockerignore").read_text().split("\n")
    for path in recipe.copied():
        if not (recipe.root / path).exists():
            yield f"COPY {path}: no such file"
        elif _ignored(path, ignore):
            yield f"COPY {path}: .dockerignore keeps it out"
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        if folder not in recipe.copied():
            yield f"{package} is not in the image; add COPY {folder} /build/source/{folder}"


def _ignored(path: str, patterns: list[str]) -> bool:
    out = False
    for pattern in patterns:
        if pattern and not pattern.startswith("#") and fnmatch.fnmatch(path, pattern.removeprefix("!")):
            out = not pattern.startswith("!")
    return out


def _packages(recipe: Recipe, pins: str) -> Iterator[str]:
    if pins not in recipe.copied():
        yield f"does not copy {pins}"
    for command in (command for rest in recipe.all("RUN") for command in rest.split("&&")):
        words = shlex.split(command)
        if "install" in words and words[words.index("install") - 1].endswith("pip") and not {"--constraint", "--requirement", "--no-index"} & set(words):
            yield f"`{command.strip()}` takes any version; add --constraint"
    for rest in recipe.all("RUN"):
        if "apt-get install" in rest and not all(part in rest for part in ("apt-get update", "--no-install-recommends", "rm -rf /var/lib/apt/lists/*")):
            yield "apt-get install belongs between apt-get update and rm -rf /var/lib/apt/lists/*, with --no-install-recommends"
    if not any("pip check" in rest for rest in recipe.all("RUN")):
        yield "never runs `pip check`, which would tell a pin that is missing"


def _labels(recipe: Recipe, project: dict) -> Iterator[str]:
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', " ".join(recipe.all("LABEL"))))
    for name in LABELS:
        if not labels.get(name):
            yield f"LABEL org.opencontainers.image.{name} is missing"
    for name, key in (("version", "version"), ("licenses", "license")):
        if labels.get(name) not in (None, project["project"][key]):
            yield f"LABEL org.opencontainers.image.{name}={labels[name]}, but pyproject.toml says {project['project'][key]}"


def _machine(recipe: Recipe) -> Iterator[str]:
    for name in ("ARG", "ENV"):
        for rest in recipe.all(name):
            if match := MACHINE.search(rest):
                yield f"{name} {match[0]} would stay in the image's history; give it as a build secret"


if __name__ == "__main__":
    everything = [breach for recipe in RECIPES for breach in breaches(Path(__file__).resolve().parents[1], recipe)]
    print("\n".join(everything) or "nothing to say against " + " and ".join(RECIPES))
    sys.exit(1 if everything else 0)
