"""metrics.jsonl as columns: the rows that `read_metrics` says count, whatever happened, and however often the file is looked at."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kan_train.accounting.lines import encode
from kan_train.accounting.sinks.jsonl import read_metrics
from kan_train.config import ConfigError
from kan_train.report.rows import SAMPLES, MetricsReader

MOVES = st.lists(st.tuples(st.sampled_from(["steps", "restart", "rewind"]), st.integers(0, 9)), max_size=20)


def history(moves: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """Rows of a run that goes `number` steps forward, or back by so many in a new segment or a rewind."""
    rows, step, lineage = [], 0, {"segment": 1, "rewinds": 0, "resumed_from": 0}
    for kind, number in moves:
        if kind == "steps":
            for _ in range(number):
                step += 1
                rows.append({"step": step, "tokens": 10 * step, "loss": len(rows) + 0.5, "load/cv/0": 0.1, "load/cv/1": step / 7} | lineage)
        else:
            step = max(0, step - number)
            again = {"segment": lineage["segment"] + 1, "rewinds": 0} if kind == "restart" else {"rewinds": lineage["rewinds"] + 1}
            lineage = lineage | again | {"resumed_from": step}
    return rows


@settings(max_examples=150, deadline=None)
@given(MOVES, st.integers(0, 200))
def test_the_rows_that_count_are_those_of_read_metrics(tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, int]], first_part: int):
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    data = b"".join(map(encode, history(moves)))
    reader = MetricsReader(path)
    path.write_bytes(data[:first_part])  # cut anywhere, as a reader sees a file that is being written
    reader.read()
    path.write_bytes(data)
    found, expected = reader.read(), read_metrics(path)
    for name in ("step", "tokens", "loss", "segment"):
        assert found.columns[name].tolist() == [row[name] for row in expected]
    assert found.columns["step"][found.sampled].tolist() == [row["step"] for row in expected]
    if expected:
        assert found.layers["load/cv"].tolist() == [[row["load/cv/0"], row["load/cv/1"]] for row in expected]


def test_what_is_not_finite_or_not_there_is_nan(tmp_path: Path):
    (tmp_path / "m").write_bytes(b"".join(encode(row | {"step": 1, "segment": 1, "resumed_from": 0}) for row in ({"loss": math.inf}, {"loss": math.nan}, {})))
    found = MetricsReader(tmp_path / "m").read()
    assert found.columns["loss"].tolist()[0] == math.inf
    assert np.isnan(found.columns["loss"][1:]).all()
    assert not found.has("loss")
    assert found.last("loss") is None
    assert not found.has("mfu")


def test_layers_of_a_long_run_are_sampled_evenly(tmp_path: Path):
    rows = history([("steps", 9)] * 200)
    (tmp_path / "m").write_bytes(b"".join(map(encode, rows)))
    found = MetricsReader(tmp_path / "m").read()
    assert len(found) == 1800
    assert SAMPLES // 2 <= len(found.sampled) <= SAMPLES
    assert set(np.diff(found.sampled).tolist()) == {8}
    assert found.layers["load/cv"][:, 1].tolist() == pytest.approx([rows[index]["load/cv/1"] for index in found.sampled])


def test_another_run_of_the_same_name_is_read_from_its_beginning(tmp_path: Path):
    reader = MetricsReader(tmp_path / "m")
    assert len(reader.read()) == 0
    (tmp_path / "m").write_bytes(b"".join(map(encode, history([("steps", 9)]))))
    assert len(reader.read()) == 9
    (tmp_path / "m").write_bytes(b"".join(map(encode, history([("steps", 3)]))))
    assert reader.read().columns["loss"].tolist() == [0.5, 1.5, 2.5]


def test_a_damaged_line_is_named(tmp_path: Path):
    (tmp_path / "m").write_bytes(encode(history([("steps", 1)])[0]) + b"{nonsense\n")
    with pytest.raises(ConfigError, match=r"m, line 2 is damaged .*; remove that line"):
        MetricsReader(tmp_path / "m").read()
