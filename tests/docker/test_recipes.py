"""The images' recipes keep what docs/containers.md promises of them, and the lint that says so sees planted mistakes. No image is built here."""

import importlib.util
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = "docker/Dockerfile.cpu", "docker/Dockerfile"


def script(name: str):  # type: ignore[no-untyped-def]
    """A file of docker/ as a module: the folder is no package, for it is not installed."""
    specification = importlib.util.spec_from_file_location(f"docker_{name}", ROOT / "docker" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


lint, building, pinning = script("lint"), script("build_without_daemon"), script("pin")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The recipes and what they name, to plant mistakes in."""
    shutil.copytree(ROOT / "docker", tmp_path / "docker", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".dockerignore"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("kan_train", "kernels", "data_tools", "conf", "launch"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize("recipe", [CPU, CUDA])
def test_the_recipes_are_sound(recipe: str, copy: Path):
    assert lint.breaches(ROOT, recipe) == []
    assert lint.breaches(copy, recipe) == [], "the copy that mistakes are planted in has none of its own"


MISTAKES = [
    ("docker/Dockerfile", "13.0.2-base-ubuntu24.04", "latest", "latest has no version"),
    ("docker/Dockerfile", "nvidia/cuda:13.0.2-base-ubuntu24.04", "nvidia/cuda", "nvidia/cuda has no version"),
    ("docker/Dockerfile", "FROM ${BASE}\n", "FROM ubuntu\n", "ubuntu has no version"),
    ("docker/Dockerfile", "FROM ${BASE}\n", "USER 7\n", "one stage"),
    ("docker/Dockerfile", "USER 10001:10001", "USER root", "ends as USER root"),
    ("docker/Dockerfile", "USER 10001:10001", "USER 0", "ends as USER 0"),
    ("docker/Dockerfile", "USER 10001:10001\n", "", "ends as USER root"),
    ("docker/Dockerfile", 'ENTRYPOINT ["kan"]', "ENTRYPOINT kan", "ENTRYPOINT runs in a shell"),
    ("docker/Dockerfile", "COPY conf /build/source/conf\n", "", "kan_train.conf is not in the image"),
    ("docker/Dockerfile", "COPY conf /build/source/conf", "COPY confs /build/source/conf", "COPY confs: no such file"),
    ("docker/Dockerfile", "COPY conf ", "ADD conf ", "use COPY"),
    (".dockerignore", "!kernels\n", "", "COPY kernels: .dockerignore keeps it out"),
    ("docker/Dockerfile", "--requirement /build/constraints.txt", "deepspeed", "takes any version"),
    ("docker/Dockerfile", "--no-index ", "", "takes any version"),
    ("docker/Dockerfile", "constraints-cuda.txt", "constraints-cpu.txt", "does not copy docker/constraints-cuda.txt"),
    ("docker/Dockerfile", "--no-install-recommends", "", "apt-get install belongs between"),
    ("docker/Dockerfile", "/opt/kan/bin/pip check", "true", "never runs `pip check`"),
    ("docker/Dockerfile", 'version="0.1.0"', 'version="0.0.9"', "version=0.0.9, but pyproject.toml says"),
    ("docker/Dockerfile", "image.licenses", "image.licence", "licenses is missing"),
    ("docker/Dockerfile", "ARG REVISION", "ARG PIP_INDEX_URL\nARG REVISION", "PIP_INDEX_URL would stay in the image's history"),
    ("docker/constraints-cuda.txt", "triton==3.7.1\n", "", "asks for triton"),
    ("docker/constraints-cuda.txt", "triton==3.7.1", "triton>=3.6", "is no pin"),
    ("docker/constraints-cuda.txt", "deepspeed==0.19.8", "deepspeed==0.14.0", "asks for deepspeed>=0.19.8"),
    ("docker/constraints-cuda.txt", "torch==2.13.0\n", "torch==2.13.0\ntorch==2.12.0\n", "stands twice"),
]


@pytest.mark.parametrize(("file", "right", "wrong", "told"), MISTAKES, ids=[told for *_, told in MISTAKES])
def test_a_planted_mistake_is_told(file: str, right: str, wrong: str, told: str, copy: Path):
    text = (copy / file).read_text()
    assert right in text
    (copy / file).write_text(text.replace(right, wrong))
    assert told in "\n".join(lint.breaches(copy, CUDA))


# What a variant may have of its own: the base, the pins, where PyTorch comes from, packages of the distribution, a label.
OWN = (
    (r"BASE=.*", "BASE="),
    (r"constraints-\w+", "constraints"),
    (r' --extra-index-url "\$\{TORCH_INDEX\}"', ""),
    (r" gcc libc6-dev python3-dev libibverbs1 ibverbs-providers", ""),
    (r"for (NVIDIA GPUs|CPUs)", ""),
)


def test_the_variants_share_the_rest():
    """The CPU image is built and tried: each instruction that the CUDA image shares with it is proved there too."""
    shared = []
    for name in (CPU, CUDA):
        text = "\n".join(" ".join(step) for step in lint.Recipe(ROOT, name).steps if not step[1].startswith("TORCH_INDEX="))
        for pattern, replacement in OWN:
            text = re.sub(pattern, replacement, text)
        shared.append(text)
    assert shared[0] == shared[1]


@pytest.mark.parametrize(("variant", "extra"), [("cpu", None), ("cuda", "gpu")])
def test_the_pins_are_closed(variant: str, extra: str | None):
    """The image installs them with --no-deps: what a pinned package needs must be pinned too, as far as this environment knows the package."""
    lines = (ROOT / "docker" / f"constraints-{variant}.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if not line.startswith("#")}
    missing = set()
    for name in pinned:
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        needed = {canonicalize_name(one.name) for one in map(Requirement, requirements) if one.marker is None or one.marker.evaluate({"extra": ""})}
        missing |= needed - pinned
    assert missing == set(), "generate the files again: python docker/pin.py"


def test_pins_come_from_the_environment_but_for_what_torch_chooses():
    assert pinning.installed_versions("cuda")["torch"] == metadata.version("torch").partition("+")[0]
    assert pinning.installed_versions("cpu")["torch"] == metadata.version("torch")
    assert "triton" not in pinning.installed_versions("cuda")
    assert "kan-train" not in pinning.installed_versions("cpu")
    assert pinning.text("cuda", {"B_c": "1", "a": "2"}).splitlines()[1:] == ["a==2", "b-c==1"]


def test_hadolint_agrees():
    """The linter of record; it comes with the development packages."""
    program = Path(sys.executable).with_name("hadolint")
    result = subprocess.run([program, ROOT / CUDA, ROOT / CPU], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "")


def test_a_build_never_deletes_a_folder_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine").write_text("")
    monkeypatch.setattr(sys, "argv", ["build_without_daemon.py", "--work", str(tmp_path)])
    monkeypatch.setattr(building.shutil, "which", lambda program: program)
    monkeypatch.setattr(building.os, "geteuid", lambda: 0)
    assert building.main() == 2
    assert "would be deleted in the end" in capsys.readouterr().err
    assert (tmp_path / "mine").exists()


def test_nothing_is_deleted_through_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "theirs").write_text("")
    monkeypatch.setattr(building, "mounts_below", lambda folder: [folder / "mounted"])
    monkeypatch.setattr(building.subprocess, "run", lambda *arguments, **options: None)
    with pytest.raises(OSError, match="still mounted"):
        building.delete(tmp_path)
    assert (tmp_path / "theirs").exists()
