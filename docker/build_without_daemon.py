"""Build and try an image where no container engine runs: as root, with buildah in a chroot, on a base that debootstrap makes.

    apt-get install buildah debootstrap
    python docker/build_without_daemon.py --work /tmp/kan-image                    the CPU image: build, check, say its size, delete all of it
    python docker/build_without_daemon.py --work /tmp/kan-image --variant cuda     the CUDA image on the same base: no GPU is used
    ... --pip-conf pip.conf --volume /wheels                                       packages from a mirror: for the build alone, the image does not hold them

It runs the Dockerfile as it stands; only the base is another one (build argument BASE). --work must not exist, and is deleted in the end.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = {"cpu": "docker/Dockerfile.cpu", "cuda": "docker/Dockerfile"}

SMALL_RUN = "model.sequence_length=64 train.steps=2 train.global_batch_size=4 train.micro_batch_size=2 optimizer.schedule.warmup_steps=1"
# A chroot's own host name resolves nowhere, hence the address.
TWO_PROCESSES = "torchrun --nproc-per-node 2 --local-addr 127.0.0.1 -m kan_train train"
ANY_USER = "as a user whom the image does not know"
CHECKS = {
    "not root": 'test "$(id -u)" = 10001 && test ! -w /opt/kan && test ! -w /usr',
    "version": "kan --version",
    "packages as pinned": "pip install --dry-run --no-deps --no-index --requirement /tmp/constraints.txt && pip check",
    "no other package": 'test "$(pip list --format=freeze | grep -vc ^kan-train==)" = "$(grep -c == /tmp/constraints.txt)"',
    "configuration": "kan train --cfg job > /tmp/config.yaml && grep -q 'name: kan_tiny' /tmp/config.yaml",
    "corpus": "kan data prepare corpus.max_documents=200",
    "two steps": f"kan train {SMALL_RUN} run.name=alone && test $(wc -l < runs/alone/metrics.jsonl) -ge 2",
    "two steps, two processes, ZeRO-2": f"{TWO_PROCESSES} {SMALL_RUN} parallel.zero_stage=2 run.name=sharded",
    "launch local": f"kan launch local --processes 2 {SMALL_RUN} run.name=launched && test -f runs/launched/launch/attempts.jsonl",
    ANY_USER: f"{TWO_PROCESSES} {SMALL_RUN} parallel.zero_stage=1 data.root=/training/corpora run.root=/tmp/anybody run.name=any",
}
CHECKS_OF_VARIANT = {"cpu": {"no compiler": "! command -v gcc cc"}, "cuda": {"triton's launcher compiles": "python /tmp/launcher.py"}}
# What triton does on its first kernel, with an empty library in place of the driver that only a machine with a GPU has.
LAUNCHER = """\
import os, subprocess, tempfile
from triton.backends.nvidia import driver
from triton.runtime.build import _build
with tempfile.TemporaryDirectory() as folder:
    subprocess.run(["gcc", "-shared", "-o", folder + "/libcuda.so.1", "-x", "c", "/dev/null"], check=True)
    source = os.path.join(driver.dirname, "driver.c")
    print(_build("cuda_utils", source, folder, [folder], driver.include_dirs, driver.libraries, []))
"""


@dataclass(frozen=True)
class Buildah:
    """buildah with a store of its own below `work`, so that nothing else on the machine is touched."""

    work: Path
    driver: str

    def __call__(self, command: str, *words: str, capture: bool = False) -> str:
        """Run one command; returns its output where it is captured. Raises CalledProcessError."""
        store = ["--root", str(self.work / "store"), "--runroot", str(self.work / "run"), "--storage-driver", self.driver]
        result = subprocess.run(["buildah", *store, command, *words], check=True, text=True, stdout=subprocess.PIPE if capture else None)
        return result.stdout.strip() if capture else ""


def main() -> int:
    """Build, check, report; returns 0 if every check passed."""
    options = parse()
    missing = [program for program in ("buildah", "debootstrap") if not shutil.which(program)]
    if missing or os.geteuid() != 0:
        print(f"needs root and {', '.join(missing) or 'nothing else'}; use apt-get install buildah debootstrap", file=sys.stderr)
        return 2
    if options.work.exists():
        print(f"--work {options.work} exists and would be deleted in the end; use --work {options.work}/kan-image", file=sys.stderr)
        return 2
    options.work.mkdir(parents=True)
    buildah = Buildah(options.work, options.storage_driver)
    try:
        figures = {"variant": options.variant, "suite": options.suite} | build(buildah, options)
        figures["checks"] = check(buildah, options.variant)
    finally:
        buildah("rm", "--all")
        buildah("rmi", "--all", "--force")
        delete(options.work)
    print(json.dumps(figures, indent=1))
    return 0 if all(outcome["passed"] for outcome in figures["checks"].values()) else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder to make and to delete; the CPU image needs 8 GB there, CUDA's four times that")
    parser.add_argument("--variant", choices=sorted(FILES), default="cpu")
    parser.add_argument("--suite", default="bookworm", help="Debian release of the base")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="where debootstrap takes it from")
    parser.add_argument("--pip-conf", type=Path, help="pip's settings during the build, given as a build secret")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="such as TORCH_INDEX=...; may be repeated")
    parser.add_argument("--volume", action="append", default=[], metavar="PATH", help="folder that pip's settings refer to, under the same path")
    parser.add_argument("--storage-driver", choices=["overlay", "vfs"], default="overlay", help="vfs works on every file system, and copies every layer")
    return parser.parse_args()


def build(buildah: Buildah, options: argparse.Namespace) -> dict[str, float]:
    """Make the base and the image kan-train:VARIANT; returns seconds and megabytes."""
    started = time.monotonic()
    base = options.work / "base"
    subprocess.run(["debootstrap", "--variant=minbase", options.suite, str(base), options.mirror], check=True, stdout=subprocess.DEVNULL)
    container = buildah("from", "scratch", capture=True)
    buildah("add", "--quiet", container, str(base), "/")
    buildah("commit", "--quiet", "--rm", container, "kan-base")
    shutil.rmtree(base)
    base_made = time.monotonic()
    words = ["--isolation", "chroot", "--file", str(ROOT / FILES[options.variant]), "--tag", f"kan-train:{options.variant}"]
    for argument in ("BASE=localhost/kan-base", f"REVISION={revision()}", *options.build_arg):
        words += ["--build-arg", argument]
    for path in options.volume:
        words += ["--volume", f"{path}:{path}:ro"]
    if options.pip_conf:
        words += ["--secret", f"id=pip,src={options.pip_conf}"]
    buildah("bud", *words, str(ROOT))
    return {"base_seconds": round(base_made - started), "build_seconds": round(time.monotonic() - base_made)}


def check(buildah: Buildah, variant: str) -> dict[str, dict[str, object]]:
    """Run every check in a container of the image, as the image's user; returns what became of each."""
    container = buildah("from", f"kan-train:{variant}", capture=True)
    folder = Path(buildah("mount", container, capture=True))
    usage = subprocess.run(["du", "--summarize", "--block-size=1M", str(folder)], check=True, text=True, capture_output=True).stdout
    (folder / "tmp/launcher.py").write_text(LAUNCHER)
    shutil.copy(ROOT / "docker" / f"constraints-{variant}.txt", folder / "tmp/constraints.txt")
    outcomes: dict[str, dict[str, object]] = {"size": {"passed": True, "megabytes": int(usage.split()[0])}}
    for name, command in (CHECKS | CHECKS_OF_VARIANT[variant]).items():
        print(f"--- {name}: {command}", flush=True)
        started = time.monotonic()
        user = ["--user", "4321:4321", "--env", "HOME=/tmp"] if name == ANY_USER else []
        try:
            buildah("run", "--isolation", "chroot", "--env", "OMP_NUM_THREADS=1", *user, container, "--", "timeout", "600", "bash", "-euc", command)
            passed = True
        except subprocess.CalledProcessError:
            passed = False
        outcomes[name] = {"passed": passed, "seconds": round(time.monotonic() - started, 1)}
    return outcomes


def delete(folder: Path) -> None:
    """Unmount what an interrupted step left below `folder`, and delete it; OSError, and nothing deleted, while something is mounted there."""
    for mount in reversed(mounts_below(folder)):
        subprocess.run(["umount", str(mount)], check=False)
    # Through a mount that is still there, deleting would reach the machine's own files.
    if left := mounts_below(folder):
        raise OSError(f"{folder} is not deleted, for {left[0]} is still mounted; umount it, then rm -r {folder}")
    shutil.rmtree(folder)


def mounts_below(folder: Path) -> list[Path]:
    """Mount points in `folder`, in the order of mounting."""
    places = (Path(line.split()[4].replace("\\040", " ")) for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [place for place in places if place.is_relative_to(folder.resolve())]


def revision() -> str:
    """The commit, for the image's label."""
    return subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], check=False, text=True, capture_output=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
