"""What every process of a layout does: train two steps and save, or load what another layout saved; save at once; train two more and save."""

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from layout_matrix.member import Replay
from layout_matrix.rows import BALANCE_RATE, LENGTH, SEQUENCES, Row, learning_rate
from safetensors.torch import load_file, save_file

from kan_train.checkpoint import save
from kan_train.engine import build_engine
from kan_train.engine.progress import Progress, random_states, restore, restore_random_states, state_for_checkpoint
from kan_train.parallel.runtime import runtime
from recovery_proofs.faults import FAULTS
from recovery_proofs.layouts import LAYOUTS, SAVED, STEPS, configuration, open_data

DRAWS = 4
"""Random numbers that each rank draws after a step, as dropout would."""


def train_part(folder: Path, layout: str, corpora: str, choices: str | None = None, origin: str | None = None, fault: str | None = None) -> None:
    """A run from its start or from the checkpoint `origin` to its end, in the processes of `layout`. Collective.

    Leaves in `folder` the checkpoints of steps SAVED and STEPS, rank-N.json (losses, norms and so on of the steps after SAVED) and
    samples-N.safetensors (what this rank read in them). choices: file with the reference's choices of groves. fault: key of FAULTS.
    """
    row = LAYOUTS[layout]
    config = configuration(row, Path(corpora))
    with runtime(config) as process, FAULTS[fault].plant() if fault else nullcontext():
        engine, data = build_engine(config, process), open_data(config)
        readers = engine.place.data
        loader = data.loader(SEQUENCES, row.micro_batch, readers.rank, readers.size)
        replay = _replay(row, process.rank, choices)
        if replay is not None:
            replay.install(engine)
        torch.manual_seed(1000 * row.world + process.rank + (0 if origin is None else 10**6))
        own_state = torch.get_rng_state()
        progress = Progress()
        if origin is not None:
            progress = restore(Path(origin), config, engine, loader, verify=True)
            restore_random_states(Path(origin), process.rank)
        seen: dict = {"losses": [], "norms": [], "skipped": [], "draws": [], "cursors": [], "optimizer_steps": []}
        samples: dict[str, torch.Tensor] = {}

        def keep() -> None:
            seen["optimizer_steps"].append(engine.state_dict()["optimizer_steps"])
            state = state_for_checkpoint(progress, config, engine, loader)
            save(folder, step=progress.step, fragments=list(engine.named_fragments()), state=state, rank_tensors=random_states(process.device))

        while progress.step < STEPS:
            if progress.step == SAVED:
                seen["kept_own_random_state"] = bool((torch.get_rng_state() == own_state).all())
                keep()
            if replay is not None:
                replay.begin(progress.step)
            batches = loader.next_step()
            result = engine.train_step(batches, learning_rate(progress.step), BALANCE_RATE)
            draws = torch.rand(DRAWS).tolist()
            if progress.step >= SAVED:
                for name, value in (("losses", result.loss), ("norms", result.grad_norm), ("skipped", result.skipped), ("draws", draws)):
                    seen[name].append(value)
                tokens = torch.cat([torch.cat((batch.tokens, batch.targets[:, -1:]), dim=1) for batch in batches])
                samples[f"{progress.step}/tokens"] = tokens
                samples[f"{progress.step}/resets"] = torch.cat([batch.resets for batch in batches if batch.resets is not None])
            progress.step += 1
            progress.tokens += SEQUENCES * LENGTH
            seen["cursors"].append(loader.cursor)
        keep()
        seen["differ"] = [] if replay is None else replay.differ
        save_file(samples, folder / f"samples-{process.rank}.safetensors")
        (folder / f"rank-{process.rank}.json").write_text(json.dumps(seen))
        loader.close()
        engine.close()


def _replay(row: Row, rank: int, choices: str | None) -> Replay | None:
    return None if choices is None or row.kind == "dense" else Replay(row, rank, load_file(choices)["choices"])
