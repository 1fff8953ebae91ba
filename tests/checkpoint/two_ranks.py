"""Run by test_ranks.py in two processes: every scenario in turn over one gloo group; what each rank saw goes to a JSON file.

    python two_ranks.py RANK PORT FOLDER
"""

import contextlib
import datetime
import errno
import json
import logging
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from kan_train.checkpoint import CheckpointError, Fragment, Ranks, load, load_rank_tensors, newest, newest_valid, save
from kan_train.checkpoint import files as checkpoint_files

SIZE = 2


def tensors() -> dict[str, Tensor]:
    """The global state, the same in every process."""
    generator = torch.Generator().manual_seed(5)
    return {
        "param/w": torch.randn(9, 8, generator=generator),
        "moment/w": torch.randn(9, 8, generator=generator).double(),
        "param/half": torch.randn(101, generator=generator).bfloat16(),
        "buffer/n": torch.randint(-(2**60), 2**60, (6,), generator=generator),
        "param/scalar": torch.randn((), generator=generator),
    }


def flat_cut(rank: int, share: float, source: dict[str, Tensor]) -> list[Fragment]:
    """Rank 0 owns the first `share` of every tensor, rank 1 the rest (as ZeRO)."""
    found = []
    for name, tensor in source.items():
        middle = round(tensor.numel() * share)
        start, stop = (0, middle) if rank == 0 else (middle, tensor.numel())
        shape = tuple(tensor.shape)
        flat = tensor.reshape(-1)[start:stop].clone()
        found.append(Fragment(name=name, global_shape=shape, local_offset=(0,) * len(shape), local_shape=shape, start=start, flat=flat))
    return found


def column_cut(rank: int, source: dict[str, Tensor]) -> list[Fragment]:
    """Matrices are halved along their columns (as tensor parallelism); the rest is replicated and written by rank 1."""
    found = []
    for name, tensor in source.items():
        if tensor.dim() == 2:
            half = tensor.shape[1] // 2
            shard = tensor[:, rank * half : (rank + 1) * half].contiguous()
            shape = tuple(tensor.shape)
            place = {"global_shape": shape, "local_offset": (0, rank * half), "local_shape": tuple(shard.shape)}
            found.append(Fragment(name=name, **place, start=0, flat=shard.view(-1)))
        else:
            found.append(Fragment.whole(name, tensor.clone(), write=rank == 1))
    return found


def exact(found: list[Fragment], expected: list[Fragment]) -> bool:
    return all(torch.equal(a.flat.view(torch.uint8), b.flat.view(torch.uint8)) for a, b in zip(found, expected, strict=True))


def zeros(source: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in source.items()}


def refused(work) -> str:
    """The message of the CheckpointError that `work` raises; then a collective, which would hang if the ranks had parted."""
    try:
        work()
    except CheckpointError as error:
        message = str(error)
    else:
        message = "no error"
    dist.barrier()
    return message


def everywhere(done: bool) -> bool:
    """Whether it is done on both ranks."""
    number = torch.tensor([int(done)])
    dist.all_reduce(number, op=dist.ReduceOp.MIN)
    return bool(number.item())


@contextlib.contextmanager
def turned(rank: int, file: Path):
    """A byte of `file` changed, for both ranks; then as it was."""

    def turn() -> None:
        dist.barrier()
        if rank == 0:
            raw = bytearray(file.read_bytes())
            raw[-1] ^= 255
            file.write_bytes(raw)
        dist.barrier()

    turn()
    yield
    turn()


@contextlib.contextmanager
def warnings_logged():
    """Messages of warnings that the checkpoint room logs."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("kan_train.checkpoint")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


class Scenarios:
    """Each method is a scenario; what it returns is what this rank saw."""

    def __init__(self, rank: int, root: Path) -> None:
        self.rank, self.root = rank, root
        self.state = tensors()
        self.flat = self.root / "flat"
        self.column = self.root / "column"

    def saved_flat_loads_by_columns(self) -> list:
        torch.manual_seed(100 + self.rank)
        rng = torch.get_rng_state()
        path = save(self.flat, step=3, fragments=flat_cut(self.rank, 0.37, self.state), state={"cursor": 9}, rank_tensors={"rng": rng})
        target = column_cut(self.rank, zeros(self.state))
        state = load(path, target)
        own = load_rank_tensors(path, self.rank, verify=False)["rng"]
        return [state, exact(target, column_cut(self.rank, self.state)), torch.equal(own, rng), path.name]

    def saved_by_columns_loads_flat(self) -> list:
        path = save(self.column, step=3, fragments=column_cut(self.rank, self.state), state={"rank": self.rank})
        target = flat_cut(self.rank, 0.6, zeros(self.state))
        return [load(path, target), exact(target, flat_cut(self.rank, 0.6, self.state))]

    def saved_by_one_process_loads_in_two(self) -> bool:
        target = flat_cut(self.rank, 0.5, zeros(self.state))
        load(newest(self.root / "single"), target)
        return exact(target, flat_cut(self.rank, 0.5, self.state))

    def a_rank_with_everything(self) -> bool:
        """Rank 1 owns nothing and still takes part; with an explicit group."""
        owned = [Fragment.whole(name, tensor) for name, tensor in self.state.items()] if self.rank == 0 else []
        path = save(self.root / "lopsided", step=1, fragments=owned, state={}, group=dist.group.WORLD)
        target = flat_cut(self.rank, 0.5, zeros(self.state))
        load(path, target, group=dist.group.WORLD)
        return exact(target, flat_cut(self.rank, 0.5, self.state))

    def _save_again(self, fragments) -> str:
        return refused(lambda: save(self.flat, step=8, fragments=fragments, state={}))

    def a_bad_fragment_on_rank_1(self) -> str:
        fragments = flat_cut(self.rank, 0.5, self.state)
        if self.rank == 1:
            fragments.append(Fragment(name="bad", global_shape=(3,), local_offset=(0,), local_shape=(4,), start=0, flat=torch.zeros(4)))
        return self._save_again(fragments)

    def a_failing_generator_on_rank_1(self) -> str:
        def fragments():
            yield from flat_cut(self.rank, 0.5, self.state)
            if self.rank == 1:
                raise KeyError("optimizer state of layer 3")

        return self._save_again(fragments())

    def written_by_both(self) -> str:
        return self._save_again([Fragment.whole(name, tensor) for name, tensor in self.state.items()])

    def written_by_none(self) -> str:
        return self._save_again(flat_cut(0, 0.5, self.state) if self.rank == 0 else [])

    def a_full_disk_on_rank_1(self) -> list:
        """Rank 1's disk is full in the middle of its file: rank 0's finished file goes too, and the checkpoint before stays."""
        real = checkpoint_files._write_hashed

        def full(file, pieces):
            real(file, pieces)
            raise OSError(errno.ENOSPC, "No space left on device")

        if self.rank == 1:
            checkpoint_files._write_hashed = full
        try:
            message = self._save_again(flat_cut(self.rank, 0.5, self.state))
        finally:
            checkpoint_files._write_hashed = real
        return [message, sorted(path.name for path in self.flat.iterdir()), str(newest(self.flat))]

    def no_manifest_because_rank_0_fails(self) -> list:
        storage = sys.modules["kan_train.checkpoint.storage"]
        real = storage.write_manifest

        def full(folder, manifest):
            raise CheckpointError("the disk is full now")

        storage.write_manifest = full
        try:
            message = self._save_again(flat_cut(self.rank, 0.5, self.state))
        finally:
            storage.write_manifest = real
        return [message, sorted(path.name for path in self.flat.iterdir())]

    def another_shape_on_rank_1(self) -> str:
        target = column_cut(self.rank, zeros(self.state))
        if self.rank == 1:
            target[0] = Fragment.whole("param/w", torch.zeros(8, 8))
        return refused(lambda: load(newest(self.flat), target))

    def a_tensor_that_no_rank_asks_for(self) -> str:
        target = [f for f in column_cut(self.rank, zeros(self.state)) if f.name != "param/half"]
        return refused(lambda: load(newest(self.flat), target))

    def a_tensor_that_one_rank_asks_for(self) -> bool:
        """Pipeline stages: each rank holds other tensors; together they hold all."""
        mine = {name: tensor for i, (name, tensor) in enumerate(self.state.items()) if i % SIZE == self.rank}
        target = zeros(mine)
        load(newest(self.flat), [Fragment.whole(name, tensor) for name, tensor in target.items()])
        return all(torch.equal(target[name], mine[name]) for name in mine)

    def a_save_in_a_thread_beside_other_collectives(self) -> list:
        """The saving thread has a group of its own; meanwhile this one sends on the default group, whose messages must not meet the save's."""
        group = dist.new_group(backend="gloo")
        paths: list[Path] = []
        wrong = 0
        for step in range(1, 6):
            fragments = flat_cut(self.rank, 0.37, self.state)
            more = {"tokens": step, "layout": {"tensor": 2}, "group": group, "rank_tensors": {"rng": torch.tensor([self.rank, step])}}

            def work(step=step, fragments=fragments, more=more):
                paths.append(save(self.root / "thread", step=step, fragments=fragments, state={"step": step}, **more))

            thread = threading.Thread(target=work)
            thread.start()
            sent = 0
            while sent < 20 or not everywhere(not thread.is_alive()):
                number = torch.tensor([float(self.rank + 1) * sent])
                dist.all_reduce(number)
                wrong += number.item() != 3.0 * sent
                sent += 1
            thread.join()
            target = column_cut(self.rank, zeros(self.state))
            loaded = load(paths[-1], target, group=group)
            wrong += loaded != {"step": step} or not exact(target, column_cut(self.rank, self.state))
        dist.destroy_process_group(group)
        return [wrong, [path.name for path in paths], newest_valid(self.root / "thread", Ranks()).name]

    def the_newest_valid(self) -> list:
        """Damage in each file of the newest checkpoint in turn, which one rank or the other hashes: both get the one before, rank 0 says why."""
        directory = self.root / "valid"
        for step in (1, 2):
            save(directory, step=step, fragments=flat_cut(self.rank, 0.5, self.state), state={}, max_file_bytes=200)
        found, said = [newest_valid(directory, Ranks()).name], []
        victims = sorted(path.name for path in (directory / "step-00000002").glob("rank*"))
        for victim in victims:
            file = directory / "step-00000002" / victim
            with turned(self.rank, file), warnings_logged() as lines:
                found.append(newest_valid(directory, Ranks()).name)
                said.append(lines)
        with turned(self.rank, directory / "step-00000002" / victims[0]), turned(self.rank, next((directory / "step-00000001").glob("rank-00001*"))):
            nothing = refused(lambda: newest_valid(directory, Ranks()))
        return [len(victims), found, said, nothing, newest_valid(directory, Ranks(), at_most=1).name]

    def a_checkpoint_that_one_rank_does_not_see(self) -> list:
        """A folder that is not shared: rank 1 sees another one of the same name."""
        directory = self.root / f"own-{self.rank}"
        alone = dist.new_group([0]), dist.new_group([1])
        for step in (1, 2) if self.rank == 0 else (1,):
            save(directory, step=step, fragments=[Fragment.whole("w", torch.ones(3))], state={}, group=alone[self.rank])
        return [refused(lambda: newest_valid(directory, Ranks()))]

    def a_flipped_bit(self) -> str:
        """In the file that rank 0 verifies or in the one rank 1 does: both ranks refuse."""
        path = newest(self.column)
        victim = sorted(path.glob("*.safetensors"))[-1]
        dist.barrier()
        if self.rank == 0:
            raw = bytearray(victim.read_bytes())
            raw[-1] ^= 1
            victim.write_bytes(raw)
        dist.barrier()
        target = flat_cut(self.rank, 0.6, zeros(self.state))
        message = refused(lambda: load(path, target))
        assert not any(f.flat.any() for f in target)
        return message


def main() -> None:
    rank, port, root = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    store = dist.TCPStore("127.0.0.1", port, SIZE, rank == 0, timeout=datetime.timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=datetime.timedelta(seconds=30))
    scenarios = Scenarios(rank, root)
    seen = {}
    for name in [name for name in vars(Scenarios) if not name.startswith("_")]:
        seen[name] = getattr(scenarios, name)()
        dist.barrier()
    (root / f"rank-{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
