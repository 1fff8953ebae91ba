"""Append-only JSON lines: whatever happens to the writer, what was written before is read back as it was."""

import json
import math
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kan_train.accounting.lines import JsonLines, count_lines, read_lines
from kan_train.config import ConfigError

VALUES = st.one_of(st.none(), st.booleans(), st.integers(-(2**53), 2**53), st.floats(), st.text(st.characters(blacklist_categories=["Cs"])))
ROWS = st.lists(st.dictionaries(st.text(st.characters(blacklist_categories=["Cs"]), min_size=1).filter(lambda name: name != "nonfinite"), VALUES), max_size=5)


def write(path: Path, rows: list[dict]) -> bytes:
    lines = JsonLines(path)
    for row in rows:
        lines.append(row)
    lines.close()
    return path.read_bytes()


def same(left: list[dict], right: list[dict]) -> bool:
    """Equality in which NaN equals itself."""
    return repr(left) == repr(right)


def refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_rows_come_back_equal_and_every_line_is_json(rows: list[dict]):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.jsonl"
        text = write(path, rows)
        for line in text.decode().split("\n")[:-1]:
            json.loads(line, parse_constant=refuse_constant)
        assert same(list(read_lines(path)), rows)


def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path: Path):
    path = tmp_path / "file.jsonl"
    text = write(path, [{"loss": math.nan, "up": math.inf, "down": -math.inf, "fine": 1.5}])
    assert json.loads(text) == {"loss": None, "up": None, "down": None, "fine": 1.5, "nonfinite": {"loss": "nan", "up": "inf", "down": "-inf"}}


def test_a_line_torn_anywhere_does_not_count_and_is_cut_off(tmp_path: Path):
    """For every byte at which a writer can die."""
    path = tmp_path / "file.jsonl"
    rows = [{"step": 1, "text": "é"}, {"step": 2, "loss": math.nan}]
    whole = write(path, rows)
    first = whole.index(b"\n") + 1
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        kept = rows[:1] if length >= first else []
        assert same(list(read_lines(path)), kept)
        assert count_lines(path) == len(kept)
        write(path, [{"step": 3}])
        assert same(list(read_lines(path)), [*kept, {"step": 3}])


def test_a_torn_line_may_be_long(tmp_path: Path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'{"step":1}\n' + b"x" * 200_000)
    write(path, [{"step": 2}])
    assert list(read_lines(path)) == [{"step": 1}, {"step": 2}]


def test_a_killed_writer_loses_no_line_it_has_finished(tmp_path: Path):
    path = tmp_path / "file.jsonl"
    code = (
        "import sys; from pathlib import Path; from kan_train.accounting.lines import JsonLines\n"
        "lines = JsonLines(Path(sys.argv[1]))\n"
        "for step in range(10**9):\n    lines.append({'step': step}); print(step, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    said = [int(writer.stdout.readline()) for _ in range(200)][-1]
    writer.send_signal(signal.SIGKILL)
    writer.communicate(timeout=30)
    steps = [row["step"] for row in read_lines(path)]
    assert len(steps) > said
    assert steps == list(range(len(steps)))


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path):
    path = tmp_path / "file.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":\n{"step":3}\n')
    with pytest.raises(ConfigError, match="line 2 is damaged"):
        list(read_lines(path))


def test_no_file_has_no_rows(tmp_path: Path):
    assert list(read_lines(tmp_path / "nothing")) == []
    assert count_lines(tmp_path / "nothing") == 0


def test_one_writer_at_a_time(tmp_path: Path):
    """Two processes that train one run would mix their rows and overwrite each other's checkpoints."""
    lines = JsonLines(tmp_path / "file.jsonl")
    with pytest.raises(ConfigError, match=r"going on already; use another run\.name"):
        JsonLines(tmp_path / "file.jsonl")
    lines.close()
    JsonLines(tmp_path / "file.jsonl").close()


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "runs").write_text("a file, not a folder")
    with pytest.raises(ConfigError, match=r"cannot be written .*use run\.root="):
        JsonLines(tmp_path / "runs" / "first" / "metrics.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_is_said(tmp_path: Path):
    with closing(JsonLines(Path("/dev/full"))) as lines, pytest.raises(ConfigError, match=r"No space left on device.*make room"):
        lines.append({"step": 1})


def test_a_write_cut_short_leaves_whole_lines(tmp_path: Path):
    """A disk that fills up within a line: the half line goes, the lines before it stay, and writing works again once there is room."""
    path = tmp_path / "file.jsonl"
    lines = JsonLines(path)
    lines.append({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
    try:
        with pytest.raises(ConfigError, match="cannot be written"):
            lines.append({"step": 2, "text": "too long for what is left"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b'{"step":1}\n'
    lines.append({"step": 3})
    assert list(read_lines(path)) == [{"step": 1}, {"step": 3}]
