"""metrics.jsonl: rows of steps that were done again do not count."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kan_train.accounting.sinks.jsonl import JsonlSink, read_metrics


def write_segment(path: Path, segment: int, resumed_from: int, steps: list[int]) -> None:
    sink = JsonlSink(path)
    sink.start({"step": resumed_from, "segment": segment})
    for step in steps:
        sink.write({"step": step, "loss": step + segment / 10, "segment": segment, "resumed_from": resumed_from})
    sink.close({})


def test_steps_done_again_count_once(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_segment(path, 1, 0, [1, 2, 3, 4, 5])
    write_segment(path, 2, 3, [4, 5, 6])
    assert [(row["step"], row["segment"]) for row in read_metrics(path)] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert len(path.read_bytes().splitlines()) == 8, "nothing is removed from the file"


def test_a_segment_replaces_all_steps_beyond_its_start_also_those_it_has_no_row_of(tmp_path: Path):
    """With a row every 10 steps, the first row after a resume at 15 is that of step 20: row 18 of before belongs to a lost time."""
    path = tmp_path / "metrics.jsonl"
    write_segment(path, 1, 0, [10, 18, 20, 30])
    write_segment(path, 2, 15, [20])
    assert [(row["step"], row["segment"]) for row in read_metrics(path)] == [(10, 1), (20, 2)]


def test_a_run_that_starts_over_keeps_nothing(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_segment(path, 1, 0, [1, 2, 3])
    write_segment(path, 2, 0, [1])
    assert [(row["step"], row["segment"]) for row in read_metrics(path)] == [(1, 2)]


def test_an_earlier_restart_still_counts_after_a_later_one(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write_segment(path, 1, 0, [1, 2, 3, 4])
    write_segment(path, 2, 2, [3, 4, 5])
    write_segment(path, 3, 4, [5, 6])
    assert [(row["step"], row["segment"]) for row in read_metrics(path)] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3)]


def test_a_segment_that_goes_back_replaces_its_own_rows(tmp_path: Path):
    """Twice to the same step, as after bad steps that come again."""
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.start({"step": 0, "segment": 1})
    for rewinds, resumed_from, steps in ((0, 0, [1, 2, 3, 4, 5]), (1, 3, [4, 5, 6]), (2, 3, [4, 5])):
        for step in steps:
            sink.write({"step": step, "segment": 1, "resumed_from": resumed_from, "rewinds": rewinds})
    sink.close({})
    assert [(row["step"], row["rewinds"]) for row in read_metrics(path)] == [(1, 0), (2, 0), (3, 0), (4, 2), (5, 2)]


SEGMENTS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 8), st.integers(1, 3)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(segments=SEGMENTS)
def test_what_counts_is_what_a_list_cut_at_every_resume_holds(segments: list[tuple[int, int, int]]):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        expected: list[tuple[int, int]] = []
        for segment, (resumed_from, count, every) in enumerate(segments, start=1):
            steps = [resumed_from + every * (index + 1) for index in range(count)]
            write_segment(path, segment, resumed_from, steps)
            if steps:
                expected = [pair for pair in expected if pair[0] <= resumed_from] + [(step, segment) for step in steps]
        assert [(row["step"], row["segment"]) for row in read_metrics(path)] == expected


def test_only_what_is_asked_for_is_kept(tmp_path: Path):
    write_segment(tmp_path / "metrics.jsonl", 1, 0, [1, 2, 3])
    write_segment(tmp_path / "metrics.jsonl", 2, 1, [2])
    rows = read_metrics(tmp_path / "metrics.jsonl", names=("loss", "nothing"))
    assert rows == read_metrics(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path / "metrics.jsonl", names=())[1] == {"step": 2, "segment": 2, "resumed_from": 1}


def test_no_file_has_no_rows(tmp_path: Path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
