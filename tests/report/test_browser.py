"""The page as Chromium draws it: light and dark, wide and narrow, alone and side by side."""

import struct
import zlib
from pathlib import Path

import pytest

from kan_train.report.history import read_history
from kan_train.report.page import pictures_of, render, write
from kan_train.report.unit import unit_of

from .browser import Browser
from .conftest import ODD

WIDTHS = {"wide": 1280, "narrow": 390}


@pytest.fixture(scope="module")
def pages(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {"one": [read_history(runs / "first")], "unpriced": [read_history(runs / ODD)], "both": [read_history(runs / name, "2") for name in ("first", ODD)]}
    for name, histories in made.items():
        write(render(histories), folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in made}


def pixel(png: bytes) -> tuple[int, int, int]:
    """The first one of a PNG of 8-bit RGB or RGBA: whatever filter its row has, nothing is before it."""
    width, _, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert (depth, kind in (2, 6)) == (8, True)
    data, position = b"", 8
    while position < len(png):
        (length,), name = struct.unpack(">I", png[position : position + 4]), png[position + 4 : position + 8]
        data += png[position + 8 : position + 8 + length] if name == b"IDAT" else b""
        position += 12 + length
    assert width
    red, green, blue = zlib.decompressobj().decompress(data, 64)[1:4]
    return red, green, blue


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("name", ["one", "unpriced", "both"])
def test_every_figure_is_drawn_without_a_complaint_or_a_request(browser: Browser, pages: dict[str, Path], name: str, width: int):
    tab = browser.open(pages[name], width=width)
    drawn = tab.value(
        """[...document.querySelectorAll('.plot')].map((plot) => [
            plot.id, plot.querySelectorAll('.main-svg').length, plot.querySelectorAll('.trace.scatter, .trace.bars, .heatmaplayer image').length,
            plot.data.length])"""
    )
    assert len(drawn) >= 4
    for plot, pictures, traces, given in drawn:
        assert pictures >= 1, plot
        assert traces == given, plot
    assert tab.problems() == []
    assert {address.split(":", 1)[0] for address in tab.requests()} <= {"file", "data", "blob"}
    assert len([address for address in tab.requests() if address.startswith("file:")]) == 1
    assert tab.value("document.documentElement.scrollWidth") <= width, "no sideways scrolling"
    outside = f"[...document.querySelectorAll('h1, h2, .tile, .card, .plot')].filter((one) => one.getBoundingClientRect().right > {width} + 0.5).length"
    assert tab.value(outside) == 0
    tab.close()


def test_light_and_dark_differ_and_can_be_chosen(browser: Browser, pages: dict[str, Path]):
    light, dark = (browser.open(pages["one"], dark=dark) for dark in (False, True))
    assert sum(pixel(light.picture(whole=False))) > 3 * 200
    assert sum(pixel(dark.picture(whole=False))) < 3 * 60
    line = "Plotly && document.getElementById('plot-throughput').data[0].line.color"
    before = light.value(line)
    assert before != dark.value(line), "curves too"
    light.value("document.querySelector('[data-theme-name=dark]').click()")
    assert light.value("document.querySelector('[data-theme-name=dark]').getAttribute('aria-pressed')") == "true"
    light.wait(f"({line}) !== '{before}'")
    assert sum(pixel(light.picture(whole=False))) < 3 * 60
    light.value("document.querySelector('[data-theme-name=auto]').click()")  # remembered, for the pages of other tests too
    # As the system changes its mind, the page follows where nobody has chosen.
    dark.scheme("light")
    dark.wait(f"({line}) === '{before}'")
    light.close()
    dark.close()


def test_texts_can_be_read_in_both(browser: Browser, pages: dict[str, Path]):
    """WCAG AA: 4.5 to 1 for every colour that text has, against what it stands on."""
    for dark in (False, True):
        tab = browser.open(pages["one"], dark=dark)
        worst = tab.value(
            """(() => {
              const light = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255)
                .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
              const style = getComputedStyle(document.documentElement), of = (name) => light(style.getPropertyValue(name).trim());
              const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
              const texts = ['--ink', '--soft', '--link', '--good', '--bad', '--warn'];
              return Math.min(...texts.flatMap((text) => ['--paper', '--card'].map((on) => ratio(of(text), of(on)))));
            })()"""
        )
        assert worst >= 4.5
        tab.close()


def test_loss_can_be_seen_against_dollars_and_time(browser: Browser, pages: dict[str, Path]):
    tab = browser.open(pages["one"])
    plot = "document.getElementById('plot-loss')"
    ends = {}
    for view in ("tokens", "spent", "time"):
        tab.value(f"document.querySelector('[data-views-of=loss] [data-view={view}]').click()")
        tab.wait(f"{plot}.dataset.drawn === '{view}'")
        ends[view] = tab.value(f"[{plot}.data[1].x.at(-1), {plot}.layout.xaxis.title.text]")
    assert ends["tokens"][0] == 30 * 128
    assert [title for _, title in ends.values()] == ["tokens", "dollars", "hours since the first start"]
    assert 0 < ends["spent"][0] < 1
    assert tab.problems() == []
    tab.close()


def test_events_can_be_chosen_by_kind(browser: Browser, pages: dict[str, Path]):
    tab = browser.open(pages["one"])
    visible = "[...document.querySelectorAll('tr[data-kind]')].filter((row) => row.offsetParent).map((row) => row.dataset.kind)"
    before = tab.value(visible)
    assert {"save", "restart", "validation", "start"} == set(before)
    tab.value("document.querySelector('[data-kind-box=save]').click()")
    assert tab.value(visible) == [kind for kind in before if kind != "save"]
    tab.close()


def test_names_are_texts_in_the_figures_too(browser: Browser, pages: dict[str, Path]):
    tab = browser.open(pages["both"])
    assert ODD in tab.value("[...document.querySelectorAll('#plot-throughput .legendtext')].map((one) => one.textContent)")
    assert tab.value("document.querySelectorAll('.plot b').length") == 0
    assert tab.value("document.title").startswith(f"first, {ODD}: ")
    tab.close()


def test_it_can_be_read_without_eyes_and_be_printed(browser: Browser, pages: dict[str, Path]):
    tab = browser.open(pages["both"])
    assert tab.value("document.documentElement.lang") == "en"
    told = "document.getElementById(one.getAttribute('aria-describedby')).textContent.trim()"
    images = tab.value(f"[...document.querySelectorAll('[role=img]')].map((one) => {told})")
    assert len(images) == len(set(images)) >= 6
    assert min(map(len, images)) > 20
    tree = tab.ask("Accessibility.getFullAXTree")["nodes"]
    spoken = [node for node in tree if not node.get("ignored") and node.get("role", {}).get("value") in ("button", "checkbox", "image", "img")]
    assert [node for node in spoken if not node.get("name", {}).get("value")] == []
    printed = tab.ask("Page.printToPDF", printBackground=True)["data"]
    assert len(printed) > 20_000
    assert tab.problems() == []
    tab.close()


def test_the_pictures_are_those_of_the_page(runs: Path, browser: Browser, pages: dict[str, Path]):
    histories = [read_history(runs / "first")]
    tab = browser.open(pages["one"])
    assert tab.value("[...document.querySelectorAll('.plot')].map((one) => one.id)") == [f"plot-{one.id}" for one in pictures_of(histories, unit_of(histories))]
    tab.close()
