"""Compile the kernels of a room for GPUs that are not there, and report what the hardware would get: registers, spills, shared memory, instructions.

    python tests/kernels/aot.py grove_gemm                    compile what is new for every target, print a table, compare with the baseline
    python tests/kernels/aot.py grove_gemm --all              compile everything
    python tests/kernels/aot.py grove_gemm --write            make it the baseline aot_<room>.json
    python tests/kernels/aot.py grove_gemm --only bf16        cases whose name holds the text

What a compiler makes of a kernel follows from triton's version, the kernel's code in triton's first representation (TTIR), and the options. The baseline keeps
a fingerprint of these beside the figures: a case with the same fingerprint is not compiled again, but for every 24th, whose figures must then come out equal.

A room takes part by a function in its module `kan_train.kernels.<room>.triton` (or by one it imports there):

    def aot_cases(target: str) -> Iterator[kan_train.kernels.backend.AotCase]

which yields every configuration that its launchers can choose on `target`, with the types that a launch would have at the stated shapes. Write ":16" after
pointers and integers that 16 divides, as a launch specialises them: without it nothing is vectorised, and the report describes another kernel.
Compiling needs no GPU: triton brings ptxas, cuobjdump and nvdisasm. It needs TRITON_INTERPRET unset, and so a process of its own.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOMS = ("grove_gemm", "edge_spline", "ada_scan", "grove_route")
TARGETS = ("sm_80", "sm_90", "gfx942")
# Bytes of shared memory that a block may use; triton.compile checks nothing, a launch would fail.
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}
REGISTERS = 65536  # of a multiprocessor, sm_80 and sm_90
SAMPLE = 24  # one in so many is compiled again though nothing has changed
LEAST_INSTRUCTIONS = 50  # one configuration that was too large once compiled to an empty kernel
_TENSOR_CORES = {"sm_80": ("HMMA",), "sm_90": ("HGMMA", "HMMA"), "gfx942": ("MFMA",)}
_SASS = {name: re.compile(rf"\b{name}\b") for name in ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDSM", "LDG", "SHFL")}
# Of the PTX: the SASS of a descriptor made on the device holds an ATOMG that is none of the kernel's.
_ATOMIC = re.compile(r"^\s*(?:@%p\d+ )?(?:atom|red)\.", re.MULTILINE)
_ISA = {"MFMA": re.compile(r"v_mfma_"), "ATOM": re.compile(r"(?:global|buffer|flat)_atomic")}
_FUSION = {"TRITON_DEFAULT_FP_FUSION": "1"}  # the default of every version so far, and no longer of the next
HERE = Path(__file__).parent


def baseline_file(room: str) -> Path:
    """Where the last accepted report of a room is kept."""
    return HERE / f"aot_{room}.json"


def compile_room(room: str, targets: tuple[str, ...] = TARGETS, timeout: float = 600) -> dict[str, dict[str, Any]]:
    """Reports of all cases of a room by "case @ target", made in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | _FUSION
    command = [sys.executable, str(Path(__file__)), room, "--json", "--targets", *targets]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if result.returncode:
        raise RuntimeError(f"the kernels of {room} do not compile:\n{result.stderr[-4000:]}")
    return json.loads(result.stdout)


def problems(report: dict[str, Any]) -> list[str]:
    """Why a kernel could not run, or should not be accepted, whatever it was before."""
    target, found = report["target"], []
    if report["shared"] > SHARED_LIMIT[target]:
        found.append(f"shared memory {report['shared']} over the limit of {SHARED_LIMIT[target]}")
    if report["spill_bytes"] > report["spills_accepted"]:
        found.append(f"spills {report['spill_bytes']} bytes, accepted are {report['spills_accepted']}")
    if target.startswith("sm_") and report["registers"] * 32 * report["warps"] > REGISTERS:
        found.append(f"{report['registers']} registers for {32 * report['warps']} threads are more than {REGISTERS}")
    if report["instructions"] < LEAST_INSTRUCTIONS:
        found.append(f"only {report['instructions']} instructions: an empty kernel")
    if report["tensor_cores_asked"] and not any(report["counts"].get(name) for name in _TENSOR_CORES[target]):
        found.append(f"no tensor-core instruction ({' or '.join(_TENSOR_CORES[target])})")
    if report["counts"].get("ATOM"):
        found.append("atomic instructions: the order of a sum would be left to chance")
    return found


def regressions(report: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What is worse than in the baseline, made by the same version of triton. A few registers more, where nothing spills, are left to ptxas's whims."""
    found = []
    if report["spill_bytes"] > before["spill_bytes"]:
        found.append(f"spills {report['spill_bytes']} bytes, were {before['spill_bytes']}")
    if report["shared"] > before["shared"]:
        found.append(f"shared memory {report['shared']}, was {before['shared']}")
    if report["registers"] > before["registers"] + 8:
        found.append(f"{report['registers']} registers, were {before['registers']}")
    if report["serialised"] > before["serialised"]:
        found.append("ptxas waits for every wgmma before the next")
    for name in ("HGMMA", "MFMA", "UTMALDG"):
        if report["counts"].get(name, 0) < before["counts"].get(name, 0):
            found.append(f"{report['counts'].get(name, 0)} {name} instructions, were {before['counts'][name]}")
    return found


def _report(room: str, target: str, number: int, every: bool) -> tuple[str, dict[str, Any]]:
    """The stored report of a case that has not changed, else a new one."""
    case = list(_cases(room, target))[number]
    name, stored = f"{case.name} @ {target}", _stored(room).get(f"{case.name} @ {target}")
    fingerprint = _fingerprint(case, target)
    unchanged = stored is not None and stored.get("fingerprint") == fingerprint
    if stored is None or not unchanged or every or number % SAMPLE == 0:
        report = _compile(case, target) | {"fingerprint": fingerprint}
        assert not unchanged or report == stored | {"spills_accepted": case.spill_bytes}, f"{name}: the same code, compiled again, gave {report}, not {stored}"
        return name, report
    return name, stored | {"spills_accepted": case.spill_bytes}


@functools.lru_cache
def _stored(room: str) -> dict[str, dict[str, Any]]:
    """The baseline's reports, if this version of triton made them."""
    import triton

    file = baseline_file(room)
    stored = json.loads(file.read_text()) if file.exists() else {"triton": ""}
    return stored["reports"] if stored["triton"] == triton.__version__ else {}


def _fingerprint(case: Any, target: str) -> str:
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    gpu = _gpu(target)
    backend = make_backend(gpu)
    options = backend.parse_options(_options(case))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = _source(case).make_ir(gpu, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    # Lines of the source file are no part of the code.
    code = re.sub(r"\s*loc\((?:[^()]|\([^()]*\))*\)|^#loc.*$", "", str(module), flags=re.MULTILINE)
    return hashlib.sha256(f"{target} {_options(case)} {code}".encode()).hexdigest()[:16]


def _options(case: Any) -> dict[str, int]:
    return {"num_warps": case.num_warps, "num_stages": case.num_stages}


def _compile(case: Any, target: str) -> dict[str, Any]:
    import triton

    log = io.StringIO()  # triton runs ptxas -v and prints its log where it is asked to; a cache hit would print none
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(_source(case), target=_gpu(target), options=_options(case))
    report: dict[str, Any] = {
        "target": target,
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "spills_accepted": case.spill_bytes,
        # gfx942 has matrix instructions for every type; NVIDIA's have none for fp32 in full precision, which cases say by tensor_cores=False.
        "tensor_cores_asked": case.tensor_cores,
    }
    return report | (_nvidia(compiled, log.getvalue(), triton) if target.startswith("sm_") else _amd(compiled))


def _cases(room: str, target: str) -> Any:
    return importlib.import_module(f"kan_train.kernels.{room}.triton").aot_cases(target)


def _gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)


def _source(case: Any) -> Any:
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    unknown = (set(case.signature) | set(case.constexprs)) - set(names)
    assert not unknown, f"{case.name}: the kernel has no arguments {sorted(unknown)}"
    signature, attributes = {}, {}
    for place, name in enumerate(names):
        if name in case.constexprs:
            signature[name] = "constexpr"
            continue
        signature[name], _, divisible = case.signature[name].partition(":")
        if divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(case.kernel, signature, dict(case.constexprs), attributes)


def _nvidia(compiled: Any, log: str, triton: Any) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([str(tools / tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    registers = re.search(r"REG:(\d+)", usage)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert registers is not None
    assert spills, f"no log of ptxas: {log[:300]}"
    # ptxas tells when it has to wait for every wgmma before the next: the pipeline would be lost without any other sign.
    counts = {name: len(pattern.findall(code)) for name, pattern in _SASS.items()} | {"ATOM": len(_ATOMIC.findall(compiled.asm["ptx"]))}
    serialised = len(re.findall(r"\(C75\d\d\)", log))
    return {
        "registers": int(registers[1]),
        "spill_bytes": sum(int(stores) for stores, _ in spills),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/", code)),
        "counts": {name: count for name, count in counts.items() if count},
        "serialised": serialised,
    }


def _amd(compiled: Any) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        assert found is not None, name
        return int(found[1])

    return {
        "registers": field("vgpr_count"),
        # Scratch is what spills take, in bytes a lane; arrays that no register holds would show here too.
        "spill_bytes": max(4 * field("vgpr_spill_count"), field("private_segment_fixed_size")),
        "instructions": len(re.findall(r"^\t[vs]_|^\t(?:global|buffer|ds|flat)_", code, re.MULTILINE)),
        "counts": {name: count for name, pattern in _ISA.items() if (count := len(pattern.findall(code)))},
        "serialised": 0,
    }


def _work(room: str, targets: list[str], only: str, every: bool) -> list[tuple[str, str, int, bool]]:
    names = [f"{case.name} @ {target}" for target in targets for case in _cases(room, target)]
    assert len(names) == len(set(names)), "two cases of one name"
    return [(room, target, number, every) for target in targets for number, case in enumerate(_cases(room, target)) if only in case.name]


def _table(reports: dict[str, dict[str, Any]], baseline: dict[str, Any]) -> str:
    lines = [f"{'case':64} {'warps':>5} {'regs':>5} {'spill':>6} {'shared':>7} {'instr':>6}  tensor cores and other instructions"]
    for name, report in reports.items():
        found = problems(report) + (regressions(report, baseline[name]) if name in baseline else [])
        counts = " ".join(f"{key}={value}" for key, value in report["counts"].items()) + (" SERIALISED" if report["serialised"] else "")
        lines.append(
            f"{name:64} {report['warps']:5} {report['registers']:5} {report['spill_bytes']:6} {report['shared']:7} {report['instructions']:6}  {counts}"
            + "".join(f"\n    ! {line}" for line in found)
        )
    return "\n".join(lines)


def main() -> None:
    """Compile, print, and write the baseline where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--only", default="")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "the interpreter compiles nothing: unset TRITON_INTERPRET"
    os.environ.update(_FUSION)
    work = _work(arguments.room, arguments.targets, arguments.only, arguments.all)
    with ProcessPoolExecutor(arguments.processes) as pool:
        reports = dict(pool.map(_report, *zip(*work, strict=True), chunksize=4)) if work else {}
    if arguments.json:
        print(json.dumps(reports))
        return
    print(_table(reports, _stored(arguments.room)))
    if arguments.write:
        import triton

        assert not arguments.only, "a baseline holds every case"
        assert tuple(arguments.targets) == TARGETS, "a baseline holds every target"
        document = {"triton": triton.__version__, "reports": dict(sorted(reports.items()))}
        baseline_file(arguments.room).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
