"""The 340B table: what its numbers are, that nothing in it is stale, and that a number changes with what it rests on and with nothing else."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kan_train.accounting import prices as price_entries
from kan_train.cli import main
from kan_train.config.errors import ConfigError
from kan_train.planner.paper import Cell, Table, build_table, table_files
from kan_train.planner.paper.facts import lookups
from kan_train.planner.paper.formula import Formula, Range
from kan_train.planner.paper.sheet import Found, Sheet
from kan_train.planner.paper.units import written

CLONE = Path(__file__).resolve().parents[2]
RESULTS = CLONE / "benchmarks" / "results"
REBUILD = "run `kan cost table --write docs` and look at what changed"


@pytest.fixture(scope="module")
def table() -> Table:
    return build_table(results=RESULTS)


def value(table: Table, name: str) -> float:
    found = table.cells[name].value
    assert found is not None, name
    return found


def verdicts(table: Table) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in table.claims}


# --- the committed files --------------------------------------------------------------------------------------------------------------------------------------


def test_the_committed_files_are_what_the_command_writes(table: Table):
    for name, text in table_files(table).items():
        assert (CLONE / "docs" / name).read_bytes() == text.encode(), f"docs/{name} is stale: {REBUILD}"


def test_a_process_of_its_own_writes_the_same_bytes(tmp_path: Path):
    """Nothing of the files depends on hash seeds, the folder, or what was computed before."""
    command = [sys.executable, "-m", "kan_train", "cost", "table", "--write", str(tmp_path), "--results", str(RESULTS)]
    subprocess.run(command, check=True, cwd=tmp_path, env={"PYTHONHASHSEED": "7", "PATH": ""}, capture_output=True, timeout=240)
    written_files = sorted(path.name for path in tmp_path.iterdir())
    assert written_files == ["cost-table.html", "cost-table.json", "cost-table.md", "cost-table.svg"]
    for name in written_files:
        assert (tmp_path / name).read_bytes() == (CLONE / "docs" / name).read_bytes(), f"docs/{name}: {REBUILD}"


def test_check_says_which_file_is_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in table_files(build_table(results=RESULTS)):
        shutil.copy(CLONE / "docs" / name, tmp_path)
    arguments = ["cost", "table", "--check", str(tmp_path), "--results", str(RESULTS)]
    assert main(arguments) == 0
    page = tmp_path / "cost-table.md"
    page.write_bytes(page.read_bytes().replace(b"$230k", b"$231k", 1))
    assert main(arguments) == 1
    assert "cost-table.md" in (error := capsys.readouterr().err)
    assert "cost-table.json" not in error


def test_json_tells_of_every_cell_all_that_the_page_does(table: Table):
    tree = json.loads(table_files(table)["cost-table.json"])
    assert set(tree["cells"]) == set(table.cells)
    for name, row in tree["cells"].items():
        assert {"value", "unit", "formula", "inputs", "price", "status"} <= set(row), name
        assert row["status"] in ("cited", "assumed", "derived", "measured"), name
        assert row["value"] == "not measured" or math.isclose(row["value"], value(table, name), rel_tol=1e-9), name
        assert row["formula"] and row["inputs"] if row["status"] == "derived" else row["source"], name


# --- the numbers ----------------------------------------------------------------------------------------------------------------------------------------------


def test_the_sets_by_hand(table: Table):
    """The arithmetic, written out with plain numbers: 2.105 TFLOP a token at 41% of 989.4 TFLOP/s, two dollars an hour."""
    speed = 0.41 * 989.4e12 / 2.1047940e12
    tokens = 2.1e6 / 2 * 3600 * speed
    expected = {
        "dense.tokens_per_second": speed,
        "set_a.dense.tokens": tokens,
        "set_a.kan.tokens_per_second": speed * 2.1e6 / 230e3,
        "set_a.active_parameters": 340e9 * 230e3 / 2.1e6,
        "set_b.kan.tokens": 230e3 / 2 * 3600 * 6.2 * speed,
        "set_b.token_ratio": 6.2 * 230e3 / 2.1e6,
        "set_c.dense.hours": 2.1e6 / 2.95,
        "set_c.kan.cost": 2.1e6 / 2.95 / 6.2 * 2,
        "check.kan.cost": 2.1e6 / 6.2,
        "check.kan.per_mtok": 2 * 1e6 / 3600 / (6.2 * speed),
        "paper.residual": 2.1e6 / 230e3 / 6.2,
    }
    for name, number in expected.items():
        assert value(table, name) == pytest.approx(number, rel=1e-6), name
    assert written(value(table, "check.kan.cost"), "USD") == "$339k"


def test_softmax_attention_at_the_solved_context_gives_the_throughput(table: Table):
    """Put back in: the context that the table solves for turns the cost ratio into the throughput ratio."""
    products, context = value(table, "sparsity.matmul_flops"), value(table, "sparsity.context_for_throughput")
    attention = 12 * 96 * 18432 * context
    assert (products + attention) / (products * 230e3 / 2.1e6 + attention) == pytest.approx(6.2, rel=1e-12)
    assert context == pytest.approx(5900, rel=0.01)


def test_the_solved_share_outside_the_groves_gives_the_ratios(table: Table):
    for name, ratio in (("cost", 2.1e6 / 230e3), ("throughput", 6.2)):
        outside = value(table, f"sparsity.outside_for_{name}")
        assert 1 / (outside + (1 - outside) * 0.06) == pytest.approx(ratio, rel=1e-12)
    assert value(table, "sparsity.ratio_dense") == pytest.approx(3.6, abs=0.05)


@pytest.mark.parametrize(
    ("name", "number", "tolerance"),
    [
        ("nemotron.tokens_per_second", 192, 0.5),
        ("nemotron.mfu", 0.408, 0.0005),
        ("nemotron.cost", 26e6, 0.1e6),
        ("deepseek.tokens_per_second", 1475, 0.5),
        ("deepseek.pretraining_tokens_per_second", 1543, 0.5),
        ("deepseek.per_mtok", 0.377, 0.0005),
        ("llama.tokens_per_second", 141, 0.6),
        ("llama.mfu", 0.37, 0.005),
        ("olmo.per_mtok", 0.29, 0.005),
        ("mpt.mfu", 0.36, 0.005),
        ("qwen.per_mtok", 0.325, 0.0005),
        ("mmlu.z", 1.77, 0.005),
        ("decode.touched_64", 0.98, 0.005),
    ],
)
def test_published_figures(table: Table, name: str, number: float, tolerance: float):
    assert value(table, name) == pytest.approx(number, abs=tolerance)


def test_the_shape_of_llama_gives_its_parameters(table: Table):
    assert value(table, "llama.parameters") == pytest.approx(405.8e9, rel=1e-3)


# --- what a number rests on -----------------------------------------------------------------------------------------------------------------------------------


def numbers(table: Table) -> dict[str, Range]:
    return {name: cell.range for name, cell in table.cells.items()}


# Much rests on the first ones, and nothing on the last.
INPUTS = ["paper.dense_cost", "paper.kan_cost", "paper.throughput_ratio", "nemotron.step", "deepseek.active", "mpt.gpus", "gpu.tokens", "deepseek.r1_mmlu"]


@pytest.mark.parametrize("name", INPUTS)
def test_a_changed_input_changes_exactly_the_cells_that_depend_on_it(table: Table, name: str):
    changed = build_table(results=RESULTS, changes={name: value(table, name) * 1.07})
    before, after = numbers(table), numbers(changed)
    measured = {cell for cell in dependents(name) if value_or_none(table, cell) is not None}
    assert {cell for cell in before if before[cell] != after[cell]} == measured


def value_or_none(table: Table, name: str) -> float | None:
    return table.cells[name].value


def test_a_common_mfu_cancels_in_the_costs(table: Table):
    """The KAN's cost at equal tokens is the claimed one of the dense model over a ratio of speeds: the MFU of both moves the tokens, not the ratio."""
    changed = build_table(results=RESULTS, changes={"dense.mfu": 0.5})
    assert value(changed, "set_a.dense.tokens") == pytest.approx(value(table, "set_a.dense.tokens") * 0.5 / 0.41)
    for name in ("check.kan.cost", "set_ours.kan.cost", "set_c.kan.cost", "set_b.token_ratio"):
        assert value(changed, name) == pytest.approx(value(table, name), rel=1e-12), name


def dependents(name: str) -> set[str]:
    """From the YAML files, without the sheet: a cell depends on what its text names, word for word."""
    definitions: dict[str, dict] = {}
    for path in (CLONE / "conf" / "table").glob("*.yaml"):
        tree = yaml.safe_load(path.read_text())
        if path.stem not in ("claims", "page", "shapes"):
            definitions |= tree
    reads = {}
    for cell, definition in definitions.items():
        text = str(definition.get("formula", "")) + " " + " ".join(str(one) for one in definition.get("extrapolated", {}).values())
        reads[cell] = set(text.replace("(", " ").replace(")", " ").split())
    reached = {name}
    while new := {cell for cell, words in reads.items() if words & reached} - reached:
        reached |= new
    return reached


def test_a_changed_price_entry_changes_the_dollars_that_rest_on_it(table: Table, monkeypatch: pytest.MonkeyPatch):
    import dataclasses

    from kan_train.planner.paper import facts

    dearer = lambda device, **which: dataclasses.replace(found := price_entries.price_of(device, **which), per_device_hour=2 * found.per_device_hour)  # noqa: E731
    monkeypatch.setattr(facts, "price_of", dearer)
    changed = build_table(results=RESULTS)
    assert value(changed, "nemotron.cost") == pytest.approx(2 * value(table, "nemotron.cost"))
    assert value(changed, "nemotron.mfu") == value(table, "nemotron.mfu")
    assert value(changed, "paper.cost_ratio") == value(table, "paper.cost_ratio")
    for name, cell in table.cells.items():
        if not cell.prices:
            assert changed.cells[name].range == cell.range, f"{name} changed with a price that it does not name"


def test_every_derived_dollar_names_its_price_entry(table: Table):
    """Dollars come from hours and a price, or else from a cost that somebody reported, which the formula then names."""
    for name, cell in table.cells.items():
        if cell.unit.startswith("USD") and cell.status == "derived":
            assert cell.prices or {"paper.dense_cost", "paper.kan_cost", "mpt.cost_reported"} & set(cell.inputs), name


# --- verdicts -------------------------------------------------------------------------------------------------------------------------------------------------


def test_verdicts(table: Table):
    found = verdicts(table)
    throughput = found.pop("throughput")
    assert found == {"cost": "contradicted", "sparsity": "supported", "inference": "not testable here", "quality": "not testable here"}
    assert throughput == "not testable here" or value_or_none(table, "gpu.ratio_340b") is not None
    assert all(claim.evidence for claim in table.claims)


def test_verdicts_follow_their_evidence():
    consistent = verdicts(build_table(results=RESULTS, changes={"paper.throughput_ratio": 9.1}))
    assert consistent["cost"] == "not testable here"
    assert verdicts(build_table(results=RESULTS, changes={"paper.throughput_ratio": 9.95 + 2}))["throughput"] == "contradicted"
    assert verdicts(build_table(results=RESULTS, changes={"paper.sparsity": 0.97}))["sparsity"] == "contradicted"


# --- measured results -----------------------------------------------------------------------------------------------------------------------------------------


def test_a_missing_result_reads_not_measured(tmp_path: Path):
    table = build_table(results=tmp_path)
    measured = [cell for cell in table.cells.values() if cell.status == "measured"]
    assert measured
    assert all(cell.value is None for cell in measured)
    assert table.cells["cpu.cost_340b_1"].value is None
    assert {"cpu.kan_step_1", "cpu.dense_step_1"} == set(table.cells["cpu.cost_340b_1"].missing)
    files = table_files(table)
    assert json.loads(files["cost-table.json"])["cells"]["cpu.ratio_340b_1"]["value"] == "not measured"
    row = next(line for line in files["cost-table.md"].splitlines() if line.startswith("| kan_tiny, fp32, one CPU thread"))
    assert row.count("not measured") == 2


def test_a_gpu_result_fills_its_cells(tmp_path: Path):
    """With the file that benchmarks/gpu.py leaves, speed and MFU of kan_1b, what they are at 340B, and the verdict on throughput are there."""
    row = {
        "name": "training, forward + backward, B 8 T 4096 kan_1b bf16", "median_ms": 400.0, "quartiles_ms": [396.0, 404.0],
        "rivals": {"dense_1b_total": {"median_ms": 1600.0, "quartiles_ms": [1590.0, 1610.0]}},
    }  # fmt: skip
    (tmp_path / "2026-12-01-nvidia-h100-80gb-hbm3-kernels.json").write_text(json.dumps({"rows": [row]}))
    table = build_table(results=tmp_path)
    assert value(table, "gpu.ratio") == 4.0
    assert table.cells["gpu.ratio"].low == pytest.approx(1590 / 404)
    assert value(table, "gpu.tokens_per_second") == pytest.approx(32768 / 0.4)
    share = value(table, "gpu.share_of_ideal")
    assert value(table, "gpu.ratio_340b") == pytest.approx(share * value(table, "flop_ratio.dense"))
    mfu = value(table, "gpu.kan_mfu")
    assert value(table, "gpu.tokens_per_second_340b") == pytest.approx(mfu * 989.4e12 / value(table, "kan.flops"))
    assert verdicts(table)["throughput"] == "supported"
    row["median_ms"], row["quartiles_ms"] = 1200.0, [1190.0, 1210.0]
    (tmp_path / "2026-12-02-nvidia-h100-80gb-hbm3-kernels.json").write_text(json.dumps({"rows": [row]}))
    assert verdicts(build_table(results=tmp_path))["throughput"] == "contradicted"


def test_the_newest_file_counts_and_rows_of_one_name_are_taken_together(tmp_path: Path):
    for day, speeds in (("2026-01-01", [9.0]), ("2026-01-02", [1.0, 2.0, 6.0])):
        (tmp_path / f"{day}-cpu-speed.json").write_text(json.dumps({"rows": [{"name": "a", "x": [x - 0.5, x, x + 0.5]} for x in speeds]}))
    found = lookups({}, tmp_path)["result"]({"file": "cpu-speed", "row": "a", "at": "x.1", "low": "x.0", "high": "x.2"})
    assert (found.value, found.low, found.high) == (2.0, 0.5, 6.5)
    assert "2026-01-02" in found.source


def test_what_the_planner_scales_is_what_it_plans(table: Table):
    """scale.plan is the planner's own ratio, smaller than that of FLOPs since messages and waiting are in it; without the measurement nothing is scaled."""
    from kan_train.planner.ratio import planned_ratio

    what = table.sheet.definitions["scale.plan"]["plan"]
    layouts = tuple((name, tuple(sorted(layout.items()))) for name, layout in what["layouts"].items())
    assert value(table, "scale.plan") == planned_ratio(layouts, what["device"], what["devices"], what["batch"])[0]
    assert value(table, "scale.plan") < value(table, "flop_ratio.dense")
    cell = table.cells["cpu.planned_340b_1"]
    assert (cell.low or 0) < value(table, "cpu.planned_340b_1") < (cell.high or 0)
    assert table.cells["gpu.planned_340b"].value is None or table.cells["gpu.share_of_ideal"].value is not None
    assert build_table(results=CLONE / "nowhere").cells["cpu.planned_340b_1"].value is None


def test_every_extrapolated_number_prints_source_factor_and_interval(table: Table):
    page = table_files(table)["cost-table.md"]
    extrapolated = [cell for cell in table.cells.values() if cell.extrapolations]
    assert {"cpu.ratio_340b_1", "cpu.cost_340b_2", "gpu.ratio_340b"} <= {cell.name for cell in extrapolated}
    for cell in extrapolated:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{cell.name}`") and "scale." in line)
        assert "benchmarks/results/" in row
        if cell.value is not None:
            assert None not in (cell.low, cell.high)
            assert f"({written(cell.low, cell.unit)} to {written(cell.high, cell.unit)})" in row


# --- the sheet ------------------------------------------------------------------------------------------------------------------------------------------------


def sheet(measured: Found | None = None, **definitions: dict) -> dict[str, Cell]:
    named = {name.replace("__", "."): definition for name, definition in definitions.items()}
    return Sheet(named, {"result": lambda _: measured}).evaluated()  # type: ignore[dict-item, return-value]


def test_an_extrapolation_without_an_interval_is_left_out():
    cells = {"a__m": {"result": {}, "unit": "x"}, "a__f": {"value": 2, "because": "test", "unit": "x"}}
    big = {"extrapolated": {"measured": "a.m", "factor": "a.f"}, "unit": "x"}
    bare = sheet(Found(status="measured", value=3.0, source="file"), **cells, a__big=big)["a.big"]
    assert bare.value is None
    assert "interval" in (bare.note or "")
    whole = sheet(Found(status="measured", value=3.0, low=2.0, high=4.0, source="file"), **cells, a__big=big)["a.big"]
    assert (whole.value, whole.low, whole.high) == (6.0, 4.0, 8.0)


def test_an_interval_spans_all_ends_of_the_inputs():
    cited = {"source": "test", "unit": "x"}
    cells = sheet(a__x={"value": 10, "within": 1, **cited}, a__y={"value": 4, "within": 1, **cited}, a__z={"formula": "a.x / a.y", "unit": "x"})
    assert (cells["a.z"].low, cells["a.z"].high) == (9 / 5, 11 / 3)


@pytest.mark.parametrize(
    ("definitions", "message"),
    [
        ({"a__x": {"formula": "a.y", "unit": "x"}, "a__y": {"formula": "a.x", "unit": "x"}}, "depend on themselves"),
        ({"a__x": {"formula": "a.nothing", "unit": "x"}}, "a.nothing"),
        ({"a__x": {"value": 3, "unit": "x"}}, "source"),
        ({"a__x": {"value": 3, "formula": "1", "because": "test", "unit": "x"}}, "exactly one"),
        ({"a__x": {"formula": "2 * 3", "source": "somebody", "unit": "x"}}, "not a cited"),
        ({"a__x": {"value": "2.1e6", "because": "test", "unit": "x"}}, "2_100_000"),
        ({"a__x": {"formula": "open('file')", "unit": "x"}}, "not a formula"),
        ({"a__x": {"formula": "1 +", "unit": "x"}}, "not a formula"),
    ],
)
def test_what_a_sheet_refuses(definitions: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        sheet(**definitions)


def test_a_condition_about_what_was_not_measured_does_not_hold():
    ranges = {"a.x": Range(None, None, None), "a.y": Range(2.0, 1.0, 3.0)}
    assert not Formula("a.x > 0").holds(ranges)
    assert not Formula("a.x < 0 or known(a.x)").holds(ranges)
    assert Formula("low(a.y) < 1.5 and high(a.y) > 2.5 and not known(a.x)").holds(ranges)
    assert not Formula("low(a.y) > 1.5").holds(ranges)


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [(2.1e6, "USD", "$2.10M"), (999_600, "USD", "$1.00M"), (0.3157, "USD/Mtok", "$0.316/Mtok"), (1759.7, "tokens/s", "1,760 tok/s"), (0.9375, "share", "93.8%"),
     (2.1048e12, "FLOP/token", "2.10 TFLOP"), (0, "share", "0%"), (-0.0037, "share", "-0.370%"), (9.999, "x", "10.0x"), (None, "x", "not measured")],
)  # fmt: skip
def test_numbers_as_people_read_them(number: float | None, unit: str, text: str):
    assert written(number, unit) == text


def test_settings_and_cells_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    results = ["--results", str(RESULTS)]
    assert main(["cost", "table", "--cell", "check.kan.cost", "--set", "paper.throughput_ratio=7", *results]) == 0
    assert capsys.readouterr().out.startswith("check.kan.cost = $300k")
    assert main(["cost", "table", "--set", "check.kan.cost=1", *results]) == 2
    assert "no cited or assumed number" in capsys.readouterr().err
    assert main(["cost", "table", "--cell", "check.kan.costs", *results]) == 2
    assert "check.kan.cost" in capsys.readouterr().err
    (taken := tmp_path / "taken").touch()
    for folder in (taken, taken / "docs"):
        assert main(["cost", "table", "--write", str(folder), *results]) == 2
        assert "must be a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["cost", "table", "--write", "nowhere", "--set", "dense.mfu=0.4", *results])
