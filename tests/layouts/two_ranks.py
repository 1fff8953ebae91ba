"""Run by test_zero.py in two processes: every scenario in turn; what each rank saw goes to a JSON file.

    RANK=.. WORLD_SIZE=2 MASTER_ADDR=.. MASTER_PORT=.. python two_ranks.py FOLDER PORT PORT PORT
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cases
import torch

from kan_train import data
from kan_train.checkpoint import load, save
from kan_train.config import Config
from kan_train.engine import build_engine
from kan_train.engine.engine import Engine
from kan_train.model.lm import LanguageModel
from kan_train.parallel.runtime import Runtime, runtime

STAGES = (0, 1, 2, 3)
CROSSINGS = ((2, 0), (0, 1), (1, 3), (3, 2))
"""Stage that saves, stage that goes on."""


def engine_for(config: Config, process: Runtime, seed: int = cases.SEED) -> Engine:
    return build_engine(config, process, seed=seed)


def run_steps(engine: Engine, process: Runtime, steps, micro_batch: int = 2) -> dict[str, list]:
    """Train on the global batches of `steps`: lists with an entry a step."""
    seen: dict[str, list] = {"losses": [], "cross_entropies": [], "norms": [], "skipped": []}
    for step in steps:
        mine = cases.batches(step, process.rank, process.world_size, micro_batch)
        result = engine.train_step(mine, cases.RATES[step], cases.BALANCE_RATE)
        for key, value in zip(seen, (result.loss, result.cross_entropy, result.grad_norm, result.skipped), strict=True):
            seen[key].append(value)
    return seen


def digest(engine: Engine) -> str:
    """A hash of all that this rank holds: masters, optimizer state, buffers, and the weights that compute."""
    found = hashlib.sha256()
    pieces = [(f.name, f.start, f.flat) for f in engine.named_fragments()]
    # ZeRO-3 gathers weights for a moment only; between steps each rank holds its part in ds_tensor.
    pieces += [(f"weights/{name}", 0, getattr(p, "ds_tensor", p).detach().reshape(-1)) for name, p in engine.model.named_parameters()]
    for name, start, flat in sorted(pieces, key=lambda piece: piece[:2]):
        found.update(f"{name}:{start}:{flat.numel()}".encode())
        found.update(flat.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def poisoned(engine: Engine, kind: str, calls: tuple[int, ...]) -> Iterator[None]:
    """Spoil the forward passes numbered `calls`, in this process alone.

    loss: its value is NaN, its gradient right: only a look at the loss finds it. gradient: the loss is right, its gradient infinite.
    """
    count = 0

    def spoil(module, inputs, output):
        nonlocal count
        count += 1
        if count - 1 not in calls:
            return None
        loss, cross_entropy = output
        if kind == "loss":
            return loss + float("nan"), cross_entropy
        loss = loss.clone()
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss, cross_entropy

    handle = engine.model.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


def agrees(process: Runtime, folder: Path, kind: str, stage: int, name: str, **settings) -> dict:
    """Five steps with a save after three, a validation, and a save of the end."""
    engine = engine_for(cases.config(kind, stage, **settings), process)
    micro_batch = settings.get("micro_batch", 2)
    seen: dict = run_steps(engine, process, range(3), micro_batch)
    save(folder / name, step=3, fragments=list(engine.named_fragments()), state=engine.state_dict())
    for key, values in run_steps(engine, process, (3, 4), micro_batch).items():
        seen[key] += values
    seen["digest"] = digest(engine)
    seen["heldout"] = engine.evaluate(cases.heldout(process.rank, process.world_size))
    seen["engine"] = engine.state_dict()
    seen["dtypes"] = sorted({str(f.flat.dtype) for f in engine.named_fragments()})
    save(folder / name, step=5, fragments=list(engine.named_fragments()), state=seen["engine"])
    engine.close()
    return seen


def resumes(process: Runtime, folder: Path, stage: int, name: str, **settings) -> dict:
    """A new engine of other weights loads the save of `agrees` after three steps, sees two spoilt steps on rank 1, and does the last two."""
    engine = engine_for(cases.config("kan", stage, **settings), process, seed=77)
    load_into(engine, folder / name / "step-00000003")
    before, steps = digest(engine), engine.state_dict()
    seen: dict = {"spoilt": []}
    for kind, calls in (("loss", (1,)), ("gradient", (0,))):
        with poisoned(engine, kind, calls) if process.rank == 1 else contextlib.nullcontext():
            spoilt = run_steps(engine, process, [0])
        pending = float(engine.model.pending_statistics().abs().sum())
        unchanged = digest(engine) == before and engine.state_dict() == steps
        seen["spoilt"].append({"kind": kind, "skipped": spoilt["skipped"], "unchanged": unchanged, "pending": pending})
    seen |= run_steps(engine, process, (3, 4)) | {"digest": digest(engine), "engine": engine.state_dict()}
    engine.close()
    return seen


def continues(process: Runtime, path: Path, stage: int) -> dict:
    """The last two steps from another stage's save after three."""
    engine = engine_for(cases.config("kan", stage), process, seed=78)
    load_into(engine, path)
    seen = run_steps(engine, process, (3, 4))
    engine.close()
    return seen


def load_into(engine: Engine, path: Path) -> None:
    state = load(path, list(engine.named_fragments()))
    engine.after_load()
    engine.load_state_dict(state)


def accumulates(process: Runtime, folder: Path, name: str, stage: int, steps: int = 4, **layout: int) -> dict:
    """One bf16 step of 8 * steps micro-batches, shared by the ranks that read different ones, saved: its first moments hold the accumulated gradient."""
    config = cases.config("dense", stage, micro_batch=1, clip=0.0, precision="bf16", layout=layout)
    config.train.global_batch_size = cases.SEQUENCES * steps
    engine = engine_for(config, process)
    readers = engine.place.data
    mine = [batch for step in range(steps) for batch in cases.batches(step, readers.rank, readers.size, 1)]
    result = engine.train_step(mine, 0.0)
    save(folder / f"accumulated-{name}", step=1, fragments=list(engine.named_fragments()), state={})
    engine.close()
    return {"norm": result.grad_norm, "loss": result.loss}


def fills(process: Runtime) -> dict:
    """Bytes of parameters on this rank while ZeRO-3 gives the model its weights: the most, those of the largest module, and those of the model."""
    from deepspeed.runtime.zero.partition_parameters import Init

    from kan_train.engine.sharded import fill_and_partition, start_libraries
    from kan_train.parallel.layout import layout_of

    config, seen = cases.config("kan", 3), []
    layout = layout_of(config, process.world_size)
    start_libraries(config, process, layout)
    model = LanguageModel(config.model)
    specs = [parameter.spec.numel * 4 for parameter in model.parameters()]
    modules = [sum(p.spec.numel * 4 for p in module.parameters(recurse=False)) for module in model.modules()]
    convert = Init._convert_to_zero_parameters

    def watched(self: Init, parameters: list) -> None:
        # A parameter that is cut holds its part, one that is not yet filled lies on the meta device.
        held = [getattr(p, "ds_tensor", p.data) for p in model.parameters() if hasattr(p, "ds_tensor") or p.device.type != "meta"]
        seen.append(sum(tensor.numel() * tensor.element_size() for tensor in held))
        convert(self, parameters)

    Init._convert_to_zero_parameters = watched
    try:
        fill_and_partition(model, config, layout, seed=cases.SEED, device=process.device)
    finally:
        Init._convert_to_zero_parameters = convert
    return {"peak": max(seen), "largest": max(modules), "whole": sum(specs)}


class Loader(data.Loader):
    """The real loader's cursor over the synthetic batches of `cases`, one global batch after the other."""

    def __init__(self, source: "Data", batch: int, rank: int, world_size: int) -> None:
        self.data, self.global_batch_size, self.rank, self.world_size = source, batch, rank, world_size
        self.cursor, self.left_out, self._ahead = 0, [], None
        self.reading = 0
        self.leave_out(source.left_out)

    def read(self, cursor: int) -> list:
        ((start, _),) = self.stretches(cursor, self.global_batch_size)
        self.reading = start // self.global_batch_size
        return cases.batches(self.reading, self.rank, self.world_size)


class Data:
    """What the trainer asks of its corpora."""

    index_hash, seed, config = "synthetic", cases.SEED, SimpleNamespace(prefetch=0)

    def __init__(self, folder: Path, left_out: list[tuple[int, int]]) -> None:
        self.tokenizer_path, self.left_out = folder / "tokenizer.model", left_out
        self.loaders: list[Loader] = []

    def loader(self, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int) -> Loader:
        self.loaders.append(Loader(self, global_batch_size, rank, world_size))
        return self.loaders[-1]


def trains(folder: Path, name: str, bad: tuple[int, ...], *, stage: int, left_out: tuple[int, ...] = (), **recovery) -> dict:
    """`train` itself on synthetic data, with rank 1 alone spoiling the global batches `bad`; those of `left_out` are never read."""
    from kan_train.engine import run, trainer

    rows, engines, digests, size = [], [], [], cases.SEQUENCES
    source = Data(folder, [(number * size, (number + 1) * size) for number in left_out])

    class Watch:
        def on_start(self, start) -> None:
            def spoil(module, inputs, output):
                loss, cross_entropy = output
                return (loss + float("nan") if source.loaders[0].reading in bad else loss), cross_entropy

            if int(os.environ["RANK"]) == 1:
                engines[0].model.register_forward_hook(spoil)

        def on_step(self, row) -> None:
            rows.append((row["step"], row["skipped_steps"]))

        def on_event(self, kind, fields) -> None:
            if kind == "skipped_step":
                rows.append((kind, fields["in_a_row"]))
            elif kind == "rewind":
                rows.append((kind, fields["step"]))

        def totals(self) -> dict[str, float]:
            return {}

        def on_end(self, end) -> None:
            rows.append((end["status"], end["step"]))
            digests.append(digest(engines[0]))

    def remembered(*arguments) -> Engine:
        engines.append(build_engine(*arguments))
        return engines[0]

    run.open_training_data = lambda *_, **__: source
    run.build_engine = remembered
    config = cases.config("kan", stage, root=str(folder / "runs"), name=name)
    config.train.steps, config.checkpoint.every = 9, 2
    for setting, value in recovery.items():
        setattr(config.recovery, setting, value)
    result = trainer.train(config, lambda *_: [Watch()])
    return {"exit_code": result.exit_code, "finished": result.finished, "steps": result.steps, "rows": rows, "digest": digests[0]}


def scenarios(process: Runtime, folder: Path) -> dict:
    """Name -> what this rank saw."""
    seen: dict = {}
    for stage in STAGES:
        seen[f"kan-{stage}"] = agrees(process, folder, "kan", stage, f"kan-{stage}")
        seen[f"resumed-{stage}"] = resumes(process, folder, stage, f"kan-{stage}")
        seen[f"dense-{stage}"] = agrees(process, folder, "dense", stage, f"dense-{stage}", clip=0.0, micro_batch=4)
    for stage in STAGES[1:]:
        seen[f"bf16-kan-{stage}"] = agrees(process, folder, "kan", stage, f"bf16-kan-{stage}", precision="bf16")
        seen[f"bf16-resumed-{stage}"] = resumes(process, folder, stage, f"bf16-kan-{stage}", precision="bf16")
        seen[f"bf16-dense-{stage}"] = agrees(process, folder, "dense", stage, f"bf16-dense-{stage}", precision="bf16")
        seen[f"accumulated-{stage}"] = accumulates(process, folder, str(stage), stage)
    seen["accumulated-pipeline"] = accumulates(process, folder, "pipeline", 2, steps=8, pipeline_parallel=2)
    seen["recompute"] = agrees(process, folder, "kan", 3, "recompute", recompute=True)
    seen["offload-2"] = agrees(process, folder, "kan", 2, "offload-2", offload=True)
    seen["offload-3"] = agrees(process, folder, "kan", 3, "offload-3", offload=True)
    seen["fills"] = fills(process)
    seen["muon"] = agrees(process, folder, "dense", 0, "muon", optimizer="muon")
    for before, after in CROSSINGS:
        seen[f"from-{before}-to-{after}"] = continues(process, folder / f"kan-{before}" / "step-00000003", after)
    return seen


def main(folder: Path, *ports: str) -> None:
    config = cases.config("kan", 1)
    with runtime(config) as process:
        seen = scenarios(process, folder)
    runs = {
        "stops": {"bad": tuple(range(2, 99)), "stage": 1, "max_bad_steps": 3, "max_rewinds": 0},
        "goes-back": {"bad": (5, 6, 7), "stage": 2, "max_bad_steps": 3},
        "never-read": {"bad": (), "stage": 2, "left_out": (5, 6, 7)},
    }
    for (name, settings), port in zip(runs.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = port  # the trainer opens a process group of its own
        seen[name] = trains(folder, name, **settings)
    (folder / f"rank-{process.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
