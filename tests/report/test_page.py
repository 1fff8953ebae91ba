"""The page: one well-formed file that loads nothing, whose figures are those of `kan cost show --json`."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest

from kan_train.accounting.lines import encode
from kan_train.cli import main
from kan_train.report.history import read_history
from kan_train.report.page import pictures_of, render
from kan_train.report.summary import tiles_of
from kan_train.report.unit import unit_of

from .conftest import ODD, STEPS, TOKENS

VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """Checks that every element is closed in its place, and keeps texts and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.ids += [named["id"] or ""] if "id" in named else []
        self.addresses += [named[name] or "" for name in ("src", "href", "action", "data") if name in named]
        if tag == "script":
            self.scripts.append((named, ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        self.text += " " if tag in ("td", "th") else ""

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self.open and self.open[-1] != "style":
            self.text += data

    def json(self, name: str) -> Any:
        """What a script element of data holds."""
        (found,) = [text for attributes, text in self.scripts if attributes.get("id") == name]
        return json.loads(found)

    def figure(self, name: str) -> dict[str, Any]:
        (found,) = [figure for figure in self.json("figures") if figure["id"] == name]
        return found


def page_of(*run_dirs: Path, price: str | None = None) -> Page:
    return Page(render([read_history(run_dir, price) for run_dir in run_dirs]))


def trace(figure: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [one for one in figure["data"] if one["name"] == name]
    return found


def shown(capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[dict[str, Any]]:
    assert main(["cost", "show", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_page_is_whole_and_loads_nothing(runs: Path):
    page = page_of(runs / "first")
    assert len(page.ids) == len(set(page.ids))
    assert page.addresses == ["#figures-of-the-run"]
    rest = [text for attributes, text in page.scripts if "Plotly.react" in text or attributes.get("type") == "application/json"]
    assert len(rest) == 3
    for text in (*rest, page.text):
        assert not re.search(r"https?://|//cdn|@import|url\(", text)
    assert "default-src 'none'" in render([read_history(runs / "first")]), "not even Plotly's own script may ask for anything"


def test_its_figures_are_those_of_kan_cost_show(runs: Path, capsys: pytest.CaptureFixture[str]):
    page = page_of(runs / "first")
    (told,) = shown(capsys, runs / "first")
    assert page.json("runs") == [told]
    bars = page.figure("buckets")["data"]
    assert {bar["name"]: bar["x"] for bar in bars} == {
        bucket: [pytest.approx(dollars, rel=1e-5)] for bucket, dollars in told["cost"]["buckets"].items() if dollars
    }
    starts = page.figure("starts")["data"]
    assert sum(sum(bar["x"]) for bar in starts) == pytest.approx(told["cost"]["total"], rel=1e-4)
    for number, start in enumerate(told["starts"]):
        assert sum(bar["x"][number] for bar in starts) == pytest.approx(start["device_seconds"] * 1e-3, rel=1e-4)
    cost = trace(page.figure("cost"), "everything")
    assert (cost["x"][-1], cost["y"][-1]) == (STEPS * TOKENS, pytest.approx(told["cost"]["per_million_retained"], rel=1e-5))
    assert f"{told['goodput']:.1%}" in page.text


def test_curves_are_those_of_the_rows_that_count(runs: Path):
    history = read_history(runs / "first")
    page = page_of(runs / "first")
    assert [start.status for start in history.account.starts] == ["killed", "finished"]
    steps = history.metrics.columns["step"].tolist()
    assert steps == list(range(1, STEPS + 1)), "each once, though some were done twice"
    line = trace(page.figure("loss"), "training")
    assert line["xs"]["tokens"] == [step * TOKENS for step in steps]
    for axis in ("spent", "time"):
        assert all(before < after for before, after in zip(line["xs"][axis], line["xs"][axis][1:], strict=False)), axis
    assert line["xs"]["spent"][-1] < history.cost.total  # type: ignore[union-attr]
    assert line["xs"]["spent"][-1] == pytest.approx(history.cost.total, rel=0.2)  # type: ignore[union-attr]
    validation = trace(page.figure("loss"), "validation")
    assert validation["xs"]["tokens"] == [step * TOKENS for step in (10, 20, 30)]
    measured = page.figure("throughput")["data"][0]
    assert measured["y"] == pytest.approx(history.metrics.columns["tokens_per_second"].tolist(), rel=1e-5)
    assert {one["name"] for one in page.figure("mfu")["data"]} == {"MFU", "MFU, causal", "HFU"}
    heat = page.figure("load-cv-0")["data"][0]
    assert [len(heat["z"]), len(heat["z"][0])] == [2, STEPS]


def test_what_happened_stands_in_the_table_and_on_the_curves(runs: Path):
    history = read_history(runs / "first")
    page = page_of(runs / "first")
    assert {event.name for event in history.events} >= {"run start", "run end", "restart", "save", "validation"}
    (restart,) = [event for event in history.events if event.name == "restart"]
    assert re.search(rf"restart\s*{restart.step}\s", page.text)
    assert "the start before was killed" in page.text
    mark = trace(page.figure("loss"), "restarts and rewinds")
    assert mark["xs"]["tokens"] == [restart.tokens]
    assert mark["text"] == [f"step {restart.step}: restart ({restart.detail})"]
    assert {one["name"] for one in page.figure("cost")["data"]} >= {"saves", "restarts and rewinds", "validations and evaluations"}


def test_plotly_knows_everything_in_the_figures(runs: Path):
    """Its Python side checks what its script would silently leave out."""
    histories = [read_history(runs / "first"), read_history(runs / ODD, "2")]
    pictures = pictures_of(histories, unit_of(histories))
    assert {picture.id for picture in pictures} >= {"loss", "cost", "buckets", "starts", "throughput", "mfu", "load-cv-0", "sparsity-touched-0"}
    for picture in pictures:
        plain = json.loads(re.sub(r'"--[a-z0-9-]+(/[\d.]+)?"', '"#123456"', json.dumps({"data": picture.data, "layout": picture.layout})))
        for one in plain["data"]:
            one.pop("xs", None)
        plotly.graph_objects.Figure(plain)


def test_without_a_price_there_are_hours_and_a_way_to_dollars(runs: Path):
    page = page_of(runs / ODD)
    assert "$2.35 a device-hour" in page.text
    assert "recorded no price, so that device-hours stand here" in page.text
    account = read_history(runs / ODD).account
    assert sum(bar["x"][0] for bar in page.figure("buckets")["data"]) == pytest.approx(account.device_seconds / 3600, rel=1e-4)
    assert "$" not in json.dumps(page.json("figures"))
    priced = page_of(runs / ODD, price="7.2")
    assert "recorded no price" not in priced.text
    assert sum(bar["x"][0] for bar in priced.figure("buckets")["data"]) == pytest.approx(account.device_seconds * 2e-3, rel=1e-4)
    assert "source: --price=7.2" in priced.text


def test_several_runs_stand_side_by_side(runs: Path, capsys: pytest.CaptureFixture[str]):
    page = page_of(runs / "first", runs / ODD, price="3.6")
    told = shown(capsys, runs / "first", runs / ODD, "--price", "3.6")
    assert page.json("runs") == told
    for number, one in enumerate(told):
        assert sum(bar["x"][number] for bar in page.figure("buckets")["data"]) == pytest.approx(one["cost"]["total"], rel=1e-4)
    colours = {name: trace(page.figure("throughput"), name)["line"]["color"] for name in ("first", "a&lt;b&gt; &amp; \"c\" 'd' %{y}")}
    assert len(set(colours.values())) == 2
    assert "times as much" in page.text
    mixed = page_of(runs / "first", runs / ODD)
    assert f"{ODD} recorded no price" in mixed.text
    assert sum(bar["x"][0] for bar in mixed.figure("buckets")["data"]) == pytest.approx(told[0]["device_seconds"] / 3600, rel=1e-4)


def test_columns_stand_below_their_headings(runs: Path, tmp_path: Path):
    """Where one run tells of its energy, the others say that they do not."""
    shutil.copytree(runs / "first", tmp_path / "told", ignore=shutil.ignore_patterns("checkpoints"))
    rows = [json.loads(line) | {"energy/joules": 4.0} for line in (tmp_path / "told" / "metrics.jsonl").read_text().splitlines()]
    (tmp_path / "told" / "metrics.jsonl").write_bytes(b"".join(map(encode, rows)))
    histories = [read_history(runs / "first"), read_history(tmp_path / "told")]
    for order, energies in ((histories, ["-", "4 J"]), (histories[::-1], ["4 J", "-"])):
        tiles = [tiles_of(order, number, unit_of(order)) for number in range(2)]
        assert [tile["label"] for tile in tiles[0]] == [tile["label"] for tile in tiles[1]]
        assert [one[-1]["value"] for one in tiles] == energies
    assert "energy" not in [tile["label"] for tile in tiles_of(histories[:1], 0, unit_of(histories[:1]))]


EVIL = "</script><script>alert(1)</script><!-- \" ' & \u2028"


def test_no_name_or_text_breaks_the_page(runs: Path, tmp_path: Path):
    shutil.copytree(runs / "first", tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    lines = [json.loads(line) for line in (tmp_path / "copy" / "ledger.jsonl").read_text().splitlines()]
    last = lines[-1]
    lines.append(last | {"event": "hang", "elapsed": last["elapsed"] + 1, "summary": EVIL, "report": "", "device": EVIL})
    for line in lines:
        if "price" in line:
            line["price"]["source"] = EVIL
    (tmp_path / "copy" / "ledger.jsonl").write_bytes(b"".join(map(encode, lines)))
    (tmp_path / "copy" / "config.yaml").write_text("model: [")
    page = page_of(tmp_path / "copy")
    assert len(page.scripts) == 4
    assert page.text.count(EVIL) >= 2, "as text"
    assert page.json("runs")[0]["cost"]["prices"][0]["source"] == EVIL
    assert ODD in page_of(runs / ODD).text


def test_a_run_that_has_done_no_step_has_a_page(tmp_path: Path, runs: Path):
    (tmp_path / "young").mkdir()
    lines = (runs / "first" / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "young" / "ledger.jsonl").write_bytes(lines[0])
    page = page_of(tmp_path / "young")
    assert "No step is done yet" in page.text
    assert [figure["id"] for figure in page.json("figures")] == ["buckets"]


def test_a_long_run_makes_a_small_page(tmp_path: Path, runs: Path):
    """20,000 rows and 2,000 saves: the page does not grow with them."""
    start = json.loads((runs / "first" / "ledger.jsonl").read_text().splitlines()[0])
    row = json.loads((runs / "first" / "metrics.jsonl").read_text().splitlines()[0])
    (tmp_path / "long").mkdir()
    with (tmp_path / "long" / "metrics.jsonl").open("wb") as metrics, (tmp_path / "long" / "ledger.jsonl").open("wb") as ledger:
        ledger.write(encode(start))
        for step in range(1, 20_001):
            metrics.write(encode(row | {"step": step, "tokens": 128 * step, "loss": 3 + 1 / step, "cross_entropy": 3 + 1 / step}))
            if step % 10 == 0:
                common = start | {"step": step, "tokens": 128 * step, "elapsed": float(step), "time": start["time"] + step}
                ledger.write(encode(common | {"event": "steps", "first_step": step - 9, "steps": 10, "seconds_step": 9.0}))
                ledger.write(encode(common | {"event": "save", "seconds": 0.5}))
    text = render([read_history(tmp_path / "long")])
    assert len(text) < 6e6
    line = trace(Page(text).figure("loss"), "training")
    assert 1500 <= len(line["x"]) <= 2000
    assert line["x"][-1] == pytest.approx(128 * 20_000, rel=1e-3)
