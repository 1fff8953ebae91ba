"""Run by test_zero.py in two processes: every scenario in turn; what each rank saw goes to a JSON file.

    RANK=.. WORLD_SIZE=2 MASTER_ADDR=.. MASTER_PORT=.. python two_ranks.py FOLDER PORT_OF_THE_LAST_SCENARIO
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import cases
import torch

from kan_train.checkpoint import load, save
from kan_train.config import Config
from kan_train.engine import build_engine
from kan_train.engine.engine import Engine
from kan_train.model.init import materialise
from kan_train.model.lm import LanguageModel
from kan_train.parallel.runtime import Runtime, runtime

STAGES = (0, 1, 2, 3)


def engine_for(config: Config, process: Runtime, seed: int = cases.SEED) -> Engine:
    return build_engine(config, materialise(LanguageModel(config.model), seed=seed), process)


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
    pieces += [(f"weights/{name}", 0, p.detach().reshape(-1)) for name, p in engine.model.named_parameters()]
    for name, start, flat in sorted(pieces, key=lambda piece: piece[:2]):
        found.update(f"{name}:{start}:{flat.numel()}".encode())
        found.update(flat.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def poisoned(engine: Engine, kind: str, calls: tuple[int, ...]) -> Iterator[None]:
    """Make the loss ("loss") or only the gradient ("gradient") of the forward passes numbered `calls` not finite, in this process alone."""
    count = 0

    def spoil(module, inputs, output):
        nonlocal count
        count += 1
        if count - 1 not in calls:
            return None
        if kind == "loss":
            return output * float("nan")
        output = output.clone()
        output.register_hook(lambda gradient: gradient * float("inf"))
        return output

    handle = engine.model.final_norm.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


def agrees(process: Runtime, folder: Path, kind: str, stage: int, name: str, **settings) -> dict:
    """Five steps, a validation, and the weights as a checkpoint."""
    engine = engine_for(cases.config(kind, stage, **settings), process)
    seen: dict = run_steps(engine, process, range(5), settings.get("micro_batch", 2))
    seen["heldout"] = engine.evaluate(cases.heldout(process.rank, process.world_size))
    seen["engine"] = engine.state_dict()
    seen["dtypes"] = sorted({str(f.flat.dtype) for f in engine.named_fragments()})
    save(folder / name, step=5, fragments=list(engine.named_fragments()), state={})
    engine.close()
    return seen


def skips(process: Runtime, stage: int, kind: str, calls: tuple[int, ...], precision: str = "fp32") -> dict:
    """Two good steps, one that rank 1 alone spoils, and a third good step; the state before and after the spoilt one."""
    engine = engine_for(cases.config("kan", stage, precision=precision), process)
    seen = run_steps(engine, process, range(2))
    before = digest(engine), engine.state_dict()
    with poisoned(engine, kind, calls) if process.rank == 1 else contextlib.nullcontext():
        bad = run_steps(engine, process, [4])
    after = digest(engine), engine.state_dict()
    pending = float(engine.model.pending_statistics().abs().sum())
    good = run_steps(engine, process, [2])
    engine.close()
    return {
        "losses": seen["losses"] + good["losses"],
        "norms": seen["norms"] + good["norms"],
        "skipped": seen["skipped"] + bad["skipped"] + good["skipped"],
        "unchanged": before == after,
        "pending": pending,
    }


def resumes(process: Runtime, folder: Path, stage: int, **settings) -> dict:
    """Five steps with a save after three; then a new engine of other weights loads it, and does the last two."""
    config = cases.config("kan", stage, **settings)
    engine = engine_for(config, process)
    run_steps(engine, process, range(3))
    path = save(folder / f"resume-{stage}-{config.train.precision}", step=3, fragments=list(engine.named_fragments()), state=engine.state_dict())
    whole = run_steps(engine, process, (3, 4)) | {"digest": digest(engine)}
    engine.close()
    engine = engine_for(config, process, seed=77)
    engine.load_state_dict(load_into(engine, path))
    again = run_steps(engine, process, (3, 4)) | {"digest": digest(engine)}
    engine.close()
    return {"whole": whole, "again": again, "path": str(path)}


def continues(process: Runtime, path: str, stage: int) -> dict:
    """A checkpoint of another stage, and the last two steps from it."""
    engine = engine_for(cases.config("kan", stage), process, seed=78)
    engine.load_state_dict(load_into(engine, Path(path)))
    seen = run_steps(engine, process, (3, 4))
    engine.close()
    return seen


def load_into(engine: Engine, path: Path) -> dict:
    state = load(path, list(engine.named_fragments()))
    engine.after_load()
    return state


def accumulates(process: Runtime, folder: Path, stage: int) -> dict:
    """One bf16 step of 16 micro-batches a rank, saved: its first moments hold the accumulated gradient."""
    config = cases.config("dense", stage, micro_batch=1, clip=0.0, precision="bf16")
    config.train.global_batch_size = 32
    engine = engine_for(config, process)
    mine = [batch for step in range(4) for batch in cases.batches(step, process.rank, process.world_size, 1)]
    result = engine.train_step(mine, 0.0)
    save(folder / f"accumulated-{stage}", step=1, fragments=list(engine.named_fragments()), state={})
    engine.close()
    return {"norm": result.grad_norm, "loss": result.loss}


def stops(folder: Path) -> dict:
    """`train` itself, on data of our own, with rank 1 spoiling every step from the third on."""
    from kan_train.engine import trainer

    class Loader:
        def __init__(self, rank: int, world_size: int) -> None:
            self.rank, self.world_size, self.step = rank, world_size, 0

        def next_step(self):
            self.step += 1
            return cases.batches(self.step - 1, self.rank, self.world_size)

        def close(self) -> None:
            pass

    class Data:
        tokenizer_path = folder / "tokenizer.model"
        index_hash = "synthetic"

        def loader(self, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int) -> Loader:
            return Loader(rank, world_size)

    rows, engines = [], []

    class Watch:
        def on_start(self, start) -> None:
            engine = engines[0]
            if int(os.environ["RANK"]) == 1:
                self.spoil = poisoned(engine, "loss", tuple(range(4, 99)))
                self.spoil.__enter__()

        def on_step(self, row) -> None:
            rows.append((row["step"], row["skipped_steps"]))

        def on_event(self, kind, fields) -> None:
            rows.append((kind, fields["in_a_row"]))

        def on_end(self, end) -> None:
            rows.append((end["status"], end["step"]))

    def remembered(*arguments) -> Engine:
        engines.append(build_engine(*arguments))
        return engines[0]

    trainer.open_training_data = lambda *_, **__: Data()
    trainer.build_engine = remembered
    config = cases.config("kan", 2, root=str(folder / "runs"), name="bad")
    config.train.steps, config.train.max_bad_steps = 20, 3
    result = trainer.train(config, lambda *_: [Watch()])
    return {"exit_code": result.exit_code, "finished": result.finished, "steps": result.steps, "rows": rows}


def scenarios(process: Runtime, folder: Path) -> dict:
    """Name -> what this rank saw."""
    seen: dict = {}
    for stage in STAGES:
        seen[f"kan-{stage}"] = agrees(process, folder, "kan", stage, f"kan-{stage}")
        seen[f"dense-{stage}"] = agrees(process, folder, "dense", stage, f"dense-{stage}", clip=0.0, micro_batch=4)
        seen[f"loss-{stage}"] = skips(process, stage, "loss", (1,))
        seen[f"gradient-{stage}"] = skips(process, stage, "gradient", (0,))
        seen[f"resume-{stage}"] = resumes(process, folder, stage)
    seen["recompute-3"] = agrees(process, folder, "kan", 3, "recompute", recompute=True)
    for stage in (1, 2, 3):
        seen[f"offload-{stage}"] = agrees(process, folder, "kan", stage, f"offload-{stage}", offload=True)
        seen[f"bf16-{stage}"] = agrees(process, folder, "dense", stage, f"bf16-{stage}", precision="bf16")
        seen[f"bf16-kan-{stage}"] = agrees(process, folder, "kan", stage, f"bf16-kan-{stage}", precision="bf16")
        seen[f"bf16-resume-{stage}"] = resumes(process, folder, stage, precision="bf16")
        seen[f"bf16-loss-{stage}"] = skips(process, stage, "loss", (0,), precision="bf16")
        seen[f"accumulated-{stage}"] = accumulates(process, folder, stage)
    seen["muon-0"] = agrees(process, folder, "dense", 0, "muon", optimizer="muon")
    for before, after in ((2, 0), (2, 1), (1, 3), (3, 2)):
        seen[f"from-{before}-to-{after}"] = continues(process, seen[f"resume-{before}"]["path"], after)
    return seen


def main(folder: Path, last_port: str) -> None:
    config = cases.config("kan", 1)
    with runtime(config) as process:
        seen = scenarios(process, folder)
    os.environ["MASTER_PORT"] = last_port  # the trainer opens a process group of its own
    seen["stops"] = stops(folder)
    (folder / f"rank-{process.rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
