"""Run by test_collectives.py: four processes take one step on each layout, with every message recorded; what each rank held and sent goes to a JSON file.

    python recorded_ranks.py FOLDER NAME NAME ..        a name is a row's of recorded_rows, or "made by hand": a group that is not Megatron's
"""

import json
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import recorded_rows
import torch.distributed as dist
from free_ports import free_port
from layout_matrix.rows import BALANCE_RATE, Row, batches
from layout_matrix.server import import_all
from recorder import Recorder

WORLD = 4
BY_HAND = "made by hand"
ZERO_3_STEPS = 3
"""In its first steps DeepSpeed's stage 3 learns the order of the modules, and compares it between the ranks: the third is like all others."""


def names_of_groups() -> dict[int, str]:
    """id -> name, of Megatron's groups: the object itself counts, a group of the same ranks made elsewhere is another one."""
    from megatron.core import parallel_state as state

    groups = {
        "tensor": state.get_tensor_model_parallel_group(),
        "context": state.get_context_parallel_group(),
        "data": state.get_data_parallel_group(),
        "pipeline": state.get_pipeline_model_parallel_group(),
        "expert": state.get_expert_model_parallel_group(),
        "expert_tensor": state.get_expert_tensor_parallel_group(),
        "expert_data": state.get_expert_data_parallel_group(),
        "data_and_context": state.get_data_parallel_group(with_context_parallel=True),
        "tensor_and_data": state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        "model": state.get_model_parallel_group(),
        "default": dist.group.WORLD,
    }
    assert len({id(group) for group in groups.values()}) == len(groups)
    return {id(group): name for name, group in groups.items()}


@contextmanager
def tensor_group_made_by_hand() -> Iterator[None]:
    """The same ranks as Megatron's tensor group, in another group."""
    from kan_train.parallel import groups

    given = groups._group
    pairs = [dist.new_group([first, first + 1]) for first in range(0, WORLD, 2)]
    with mock.patch.object(groups, "_group", lambda dimension: pairs[dist.get_rank() // 2] if dimension == "tensor" else given(dimension)):
        yield


@contextmanager
def counting_exchanges() -> Iterator[list[list[int]]]:
    """[rows sent, rows received, choices received] of every exchange of tokens."""
    from kan_train.parallel.expert import Exchange

    seen: list[list[int]] = []
    original = Exchange.__init__

    def counted(self, *arguments) -> None:
        original(self, *arguments)
        seen.append([sum(self.rows_sent), sum(self.rows_received), sum(self.choices_received)])

    with mock.patch.object(Exchange, "__init__", counted):
        yield seen


def measure(row: Row, process) -> dict:
    """One step of a row on this rank, with what a trainer asks of all ranks beside it."""
    from kan_train.engine import build_engine

    engine, recorder = build_engine(recorded_rows.config(row), process), Recorder()
    known = names_of_groups()
    for step in range(ZERO_3_STEPS if row.zero == 3 else 1):
        recorder.clear()
        with recorder.listening(), counting_exchanges() as exchanges, watching_gradients(engine) as gradients:
            engine.train_step(batches(row, process.rank, step), 1e-3, BALANCE_RATE)
            engine.state_dict()
            process.largest(1)
            process.barrier()
    counts = Counter((known.get(id(m.group), "unknown"), m.operation, m.bytes, m.caller) for m in recorder.messages)
    passes = 2 if row.recompute else 1  # a recomputed layer exchanges the same tokens once more
    routed = [sum(column) // passes for column in zip(*exchanges, strict=True)]
    seen = {"messages": [[*key, number] for key, number in counts.items()], "held": held(engine), "flat": flat(engine), "routed": routed}
    seen["gradients"] = max(gradients, default=None)
    engine.close()
    return seen


def held(engine) -> dict[str, int]:
    """Bytes on this rank by kind: weights that compute, masters ("param") and moments."""
    found: Counter[str] = Counter()
    for part in engine.parts:
        for _, parameter in part.named_parameters():
            own = getattr(parameter, "ds_tensor", parameter)
            found["weights"] += own.numel() * own.element_size()
    for fragment in engine.named_fragments():
        found[fragment.name.partition("/")[0]] += fragment.flat.numel() * fragment.flat.element_size()
    return dict(found)


@contextmanager
def watching_gradients(engine) -> Iterator[list[int]]:
    """Bytes of the gradients that are kept, after every micro-batch; where a pipeline adds them in fp32, at the end of its schedule."""
    seen: list[int] = []
    with ExitStack() as patches:
        if hasattr(engine, "stages"):
            if engine.sums is not None:
                give_back = engine.sums.give_back

                def after_schedule() -> None:
                    sums = size_of(list(engine.sums.sums.values()))
                    give_back()
                    seen.append(sums + size_of([parameter.grad for parameter in engine.names]))

                patches.enter_context(mock.patch.object(engine.sums, "give_back", after_schedule))
        else:
            step = engine.engine.step

            def after_micro_batch(*arguments, **more):
                if not engine.engine.is_gradient_accumulation_boundary():
                    seen.append(gradients_kept(engine))
                return step(*arguments, **more)

            patches.enter_context(mock.patch.object(engine.engine, "step", after_micro_batch))
        yield seen


def gradients_kept(engine) -> int:
    optimizer, stage = engine.optimizer, engine.stage
    if stage == 3:
        return size_of([optimizer.grad_partitions_flat_buffer])
    if stage == 2:
        lists = [*optimizer.averaged_gradients.values(), *optimizer.all_grad_tensors.values()]
        return size_of([tensor for kept in lists if kept is not None for tensor in getattr(kept, "gradients", kept)])
    return size_of([parameter.grad for parameter in engine.names]) + size_of(getattr(optimizer, "fp32_groups_gradients_flat", []))


def size_of(tensors: list) -> int:
    """Bytes of the memory behind tensors, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None}
    return sum(storages.values())


def flat(engine) -> int | None:
    """Bytes of the fp32 tensors that DeepSpeed's optimizer steps, padding included; None where it steps the weights."""
    for name in ("fp32_groups_flat_partition", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        if tensors := getattr(engine.optimizer, name, None):
            return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return None


def serve(rank: int, folder: Path, port: int, name: str) -> None:
    from kan_train.parallel.runtime import runtime

    sizes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in sizes.items()})
    rows = {row.name: row for row in (*recorded_rows.FAST_ROWS, *recorded_rows.SLOW_ROWS)}
    with runtime(recorded_rows.config(recorded_rows.FAST_ROWS[0])) as process:
        if name == BY_HAND:
            with tensor_group_made_by_hand():
                seen = measure(recorded_rows.FAST_ROWS[0], process)
        else:
            seen = measure(rows[name], process)
    (folder / f"{name}-rank-{rank}.json").write_text(json.dumps(seen))


def run(folder: Path, name: str) -> None:
    """One row in four processes of its own: groups that were given up leave their threads behind, and a hundred of them stop a machine."""
    ranks, port = set(), free_port()
    for rank in range(WORLD):
        process = os.fork()
        if process == 0:
            try:
                serve(rank, folder, port, name)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        ranks.add(process)
    while ranks:
        process, status = os.wait()
        ranks.discard(process)
        if status:  # the others would wait for it, for as long as a collective may take
            for other in ranks:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            raise SystemExit(f"{name}: a rank ended with exit code {os.waitstatus_to_exitcode(status)}")


def main() -> None:
    folder, *names = sys.argv[1:]
    import_all()
    for name in names:
        run(Path(folder), name)


if __name__ == "__main__":
    main()
