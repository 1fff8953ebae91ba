"""The loader: one global sequence of samples, whatever the number of ranks, the batch sizes, the prefetching and the restarts."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kan_train.config import ConfigError, DataConfig
from kan_train.data import Batch, Loader, TrainingData, open_training_data

T = 16
Corpora = tuple[Path, dict[str, np.ndarray]]


def open_data(root: Path, *, blend: dict[str, float] | None = None, seed: int = 3, sequence_length: int = T, **settings: object) -> TrainingData:
    config = DataConfig(root=str(root), blend=blend or {"one": 1.0}, **{"prefetch": 0, **settings})  # type: ignore[arg-type]
    return open_training_data(config, sequence_length=sequence_length, seed=seed, vocab_size=256)


def rows(batches: list[Batch]) -> np.ndarray:
    """[sequences, T + 1] from the batches of one rank."""
    whole = [torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1) for batch in batches]
    return torch.cat(whole).numpy()


def read(data: TrainingData, steps: int, *, global_batch: int = 12, micro_batch: int = 2, world_size: int = 1, state: dict | None = None) -> np.ndarray:
    """[steps * global_batch, T + 1] as all ranks together read it."""
    loaders = [data.loader(global_batch, micro_batch, rank, world_size) for rank in range(world_size)]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
    steps_read = [np.concatenate([rows(loader.next_step()) for loader in loaders]) for _ in range(steps)]
    for loader in loaders:
        loader.close()
    return np.concatenate(steps_read)


def test_one_epoch_is_the_corpus_cut_into_overlapping_sequences(corpora: Corpora) -> None:
    """Sequence i is stream[i T : i T + T + 1], over the borders of shards too; shuffled, each comes once an epoch."""
    root, streams = corpora
    count = (len(streams["one"]) - 1) // T
    expected = np.stack([streams["one"][i * T : i * T + T + 1] for i in range(count)])
    assert np.array_equal(read(open_data(root, shuffle=False), count, global_batch=1, micro_batch=1), expected)
    shuffled = read(open_data(root), count, global_batch=1, micro_batch=1)
    assert not np.array_equal(shuffled, expected)
    assert np.array_equal(shuffled[np.lexsort(shuffled.T)], expected[np.lexsort(expected.T)])


def test_batches_are_what_the_model_needs(corpora: Corpora) -> None:
    batch = open_data(corpora[0]).loader(12, 4, 0, 1).next_step()[0]
    assert batch.tokens.shape == batch.targets.shape == batch.resets.shape == (4, T)
    assert (batch.tokens.dtype, batch.targets.dtype, batch.resets.dtype) == (torch.int64, torch.int64, torch.bool)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert torch.equal(batch.resets, batch.tokens == 1)
    assert batch.resets.any()
    assert open_data(corpora[0], reset_at_documents=False).loader(12, 4, 0, 1).next_step()[0].resets is None


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 12), (2, 3), (3, 2), (4, 1), (6, 2), (12, 1)])
def test_the_samples_do_not_depend_on_the_layout(corpora: Corpora, world_size: int, micro_batch: int) -> None:
    data = open_data(corpora[0], blend={"one": 0.6, "two": 0.4})
    assert np.array_equal(read(data, 30, world_size=world_size, micro_batch=micro_batch), read(data, 30))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize(("before", "after"), [((1, 2), (4, 3)), ((4, 1), (1, 12)), ((3, 4), (2, 1))], ids=str)
def test_a_run_resumes_exactly_at_another_size(corpora: Corpora, before: tuple[int, int], after: tuple[int, int], prefetch: int) -> None:
    """The state counts what was handed out, not what was read ahead; it is the same on every rank, and JSON."""
    data = open_data(corpora[0], blend={"one": 1.0, "two": 2.0}, prefetch=prefetch)
    straight = read(data, 40)
    loaders = [data.loader(12, before[1], rank, before[0]) for rank in range(before[0])]
    for _ in range(17):
        for loader in loaders:
            loader.next_step()
    states = [loader.state_dict() for loader in loaders]
    for loader in loaders:
        loader.close()
    assert all(state == states[0] for state in states)
    resumed = read(data, 23, world_size=after[0], micro_batch=after[1], state=states[0])
    assert np.array_equal(resumed, straight[17 * 12 :])


def test_a_run_resumes_exactly_with_another_global_batch(corpora: Corpora) -> None:
    data = open_data(corpora[0])
    loader = data.loader(12, 4, 0, 1)
    for _ in range(5):
        loader.next_step()
    resumed = read(data, 6, global_batch=10, micro_batch=5, state=loader.state_dict())
    assert np.array_equal(resumed, read(data, 10)[60:])


def test_loading_a_state_into_a_running_loader_discards_what_it_read_ahead(corpora: Corpora) -> None:
    data = open_data(corpora[0], prefetch=3)
    loader = data.loader(12, 12, 0, 1)
    start = loader.state_dict()
    first = rows(loader.next_step())
    second = rows(loader.next_step())
    loader.load_state_dict(start)
    assert np.array_equal(rows(loader.next_step()), first)
    assert np.array_equal(rows(loader.next_step()), second)
    loader.close()


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("ranges", [[(24, 36)], [(12, 13), (20, 29), (29, 31)], [(0, 7)], [(40, 60), (35, 45)]])
def test_samples_left_out_are_never_read_and_all_others_in_order(corpora: Corpora, ranges: list[tuple[int, int]], prefetch: int) -> None:
    """Over a resume at another size and with another global batch too."""
    data = open_data(corpora[0], prefetch=prefetch)
    expected = [row for number, row in enumerate(read(data, 8)) if not any(start <= number < stop for start, stop in ranges)]
    loader = data.loader(12, 2, 0, 1)
    loader.leave_out(ranges)
    first = [rows(loader.next_step()) for _ in range(2)]
    state = loader.state_dict()
    loader.close()
    assert state["cursor"] == 24
    found = np.concatenate([*first, read(data, 4, global_batch=8, micro_batch=2, world_size=2, state=state)])
    assert np.array_equal(found, np.stack(expected[: len(found)]))
    assert len(found) == 56


def test_what_is_left_out_adds_up(corpora: Corpora) -> None:
    loader = open_data(corpora[0]).loader(12, 2, 0, 1)
    loader.leave_out([(24, 36)])
    # Cursors count what is handed out: 24 to 36 are now the samples 36 to 48.
    assert loader.stretches(12, 24) == [(12, 24), (36, 48)]
    loader.leave_out(loader.stretches(24, 12))
    assert loader.left_out == [(24, 48)]
    assert loader.stretches(24, 12) == [(48, 60)]


def test_seeds_give_other_orders_of_the_same_samples(corpora: Corpora) -> None:
    count = (len(corpora[1]["one"]) - 1) // T
    first, second = (read(open_data(corpora[0], seed=seed), count, global_batch=1, micro_batch=1) for seed in (3, 4))
    assert not np.array_equal(first, second)
    assert np.array_equal(first[np.lexsort(first.T)], second[np.lexsort(second.T)])


def test_a_blend_draws_the_shares_it_names(corpora: Corpora, write_corpus: Callable, tmp_path: Path) -> None:
    """Corpora of disjoint tokens: which one a sequence is from can be seen."""
    root = tmp_path / "blend"
    for number, name in enumerate(("a", "b", "c")):
        write_corpus(root, name, [np.full(40, 10 + number)] * 30)
    drawn = read(open_data(root, blend={"a": 0.5, "b": 0.3, "c": 0.2}), 100, global_batch=10, micro_batch=10)
    source = drawn.max(axis=1)
    assert np.bincount(source)[10:].tolist() == [500, 300, 200]
    for step in range(100):
        assert np.bincount(source[: 10 * step + 10])[10:].tolist() == [5 * step + 5, 3 * step + 3, 2 * step + 2]


def test_a_corpus_of_wide_tokens_is_read_as_it_is(write_corpus: Callable, random_documents: Callable, tmp_path: Path) -> None:
    stream = write_corpus(tmp_path, "one", random_documents(30, seed=3, vocab_size=150_000), vocab_size=150_000)
    config = DataConfig(root=str(tmp_path), blend={"one": 1.0}, shuffle=False)
    data = open_training_data(config, sequence_length=T, seed=0, vocab_size=151_040)
    loader = data.loader(1, 1, 0, 1)
    assert stream.max() > 2**16
    assert np.array_equal(rows(loader.next_step())[0], stream[: T + 1])
    loader.close()


# --- held-out ---


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 4), (2, 3), (3, 1), (4, 8)])
def test_heldout_is_the_same_set_for_every_layout(corpora: Corpora, world_size: int, micro_batch: int) -> None:
    data = open_data(corpora[0], blend={"one": 1.0, "two": 1.0})
    alone = [rows(data.heldout(5, 1, 0, 1))]
    ranks = [data.heldout(5, micro_batch, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    read_rows = np.concatenate([rows(batches) for batches in ranks])
    counted = np.concatenate([torch.cat([batch.targets for batch in batches]).numpy() for batches in ranks])
    real = (counted >= 0).all(axis=1)
    assert ((counted >= 0).any(axis=1) == real).all(), "a row counts whole or not at all"
    assert (read_rows[:, :-1] >= 0).all(), "padding is a token that the embedding has"
    assert sorted(map(tuple, read_rows[real])) == sorted(map(tuple, np.concatenate(alone)))


def test_heldout_does_not_depend_on_the_seed_and_counts_its_bytes(corpora: Corpora) -> None:
    data, other = open_data(corpora[0], seed=3), open_data(corpora[0], seed=4)
    targets = torch.cat([batch.targets for batch in data.heldout(3, 2, 0, 1)])
    assert torch.equal(targets, torch.cat([batch.targets for batch in other.heldout(3, 2, 0, 1)]))
    counted = targets[targets >= 0].numpy()
    length = np.where(counted == 1, 0, counted % 7)
    assert data.bytes_per_token_heldout == pytest.approx(length.mean(), rel=1e-12)


def test_heldout_gives_all_there_is_once_where_more_is_asked(corpora: Corpora) -> None:
    batches = open_data(corpora[0]).heldout(10_000, 4, 0, 1)
    found = [tuple(row) for row in rows(batches) if row[-1] >= 0]
    assert 0 < len(found) < 10
    assert len(set(found)) == len(found)


# --- prefetching ---


def test_an_error_of_the_reading_thread_reaches_the_training_thread_each_time(corpora: Corpora, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = open_data(corpora[0], prefetch=2).loader(12, 12, 0, 1)

    def fail(self: Loader, cursor: int) -> list[Batch]:
        raise OSError("the disk is gone")

    first = rows(loader.next_step())
    loader.close()
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "read", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                loader.next_step()
    assert loader.state_dict()["cursor"] == 12, "a step that failed was not handed out"
    second = rows(loader.next_step())
    loader.close()
    assert np.array_equal(np.concatenate([first, second]), read(open_data(corpora[0]), 2))


def test_closing_ends_the_thread_and_may_be_done_twice(corpora: Corpora) -> None:
    before = threading.active_count()
    loader = open_data(corpora[0], prefetch=2).loader(12, 12, 0, 1)
    loader.next_step()
    assert threading.active_count() == before + 1
    loader.close()
    loader.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


# --- what is refused ---


def test_another_order_is_refused_by_name(corpora: Corpora) -> None:
    state = open_data(corpora[0]).loader(12, 12, 0, 1).state_dict()
    with pytest.raises(ConfigError, match=r"run\.seed=3"):
        open_data(corpora[0], seed=4).loader(12, 12, 0, 1).load_state_dict(state)
    others = [
        open_data(corpora[0], blend={"two": 1.0}),
        open_data(corpora[0], blend={"one": 1.0, "two": 0.1}),
        open_data(corpora[0], shuffle=False),
        open_data(corpora[0], sequence_length=T - 1),
    ]
    for other in others:
        with pytest.raises(ConfigError, match="init_from"):
            other.loader(12, 12, 0, 1).load_state_dict(state)


def test_a_corpus_that_changed_since_is_refused(corpora: Corpora, write_corpus: Callable, random_documents: Callable, tmp_path: Path) -> None:
    state = open_data(corpora[0]).loader(12, 12, 0, 1).state_dict()
    write_corpus(tmp_path / "again", "one", random_documents(60, seed=9))
    with pytest.raises(ConfigError, match="not those of the run"):
        open_data(tmp_path / "again").loader(12, 12, 0, 1).load_state_dict(state)


def test_batch_sizes_that_do_not_divide_are_refused(corpora: Corpora) -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=10"):
        open_data(corpora[0]).loader(10, 4, 0, 2)


def test_corpora_too_short_for_a_sequence_are_refused(corpora: Corpora) -> None:
    data = open_data(corpora[0], sequence_length=100_000)
    with pytest.raises(ConfigError, match=r"model\.sequence_length"):
        data.loader(1, 1, 0, 1)
