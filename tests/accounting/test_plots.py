"""The picture shows what metrics.jsonl holds."""

import math
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from kan_train.accounting.plots import TRAINING, VALIDATION, draw_losses, main
from kan_train.accounting.sinks.jsonl import JsonlSink
from kan_train.config import ConfigError


def metrics(folder: Path, losses: list[float], *, validated: bool = True) -> Path:
    sink = JsonlSink(folder / "metrics.jsonl")
    sink.start({})
    for step, loss in enumerate(losses, start=1):
        row = {"step": step, "tokens": 4096 * step, "loss": loss, "segment": 1, "resumed_from": 0}
        sink.write(row | ({"validation/loss": loss + 0.1} if validated and step % 10 == 0 else {}))
    sink.close({})
    return folder / "metrics.jsonl"


def pixels(picture: Path, colour: str) -> np.ndarray:
    """(row, column) of every pixel that has the colour."""
    image = imread(picture)[..., :3]
    return np.argwhere(np.abs(image - to_rgb(colour)).max(axis=-1) < 0.02)


def test_both_losses_are_drawn(tmp_path: Path):
    draw_losses(metrics(tmp_path, [9 - step / 20 for step in range(100)]), tmp_path / "loss.png")
    assert len(pixels(tmp_path / "loss.png", TRAINING)) > 500
    assert len(pixels(tmp_path / "loss.png", VALIDATION)) > 500


def test_a_falling_loss_falls(tmp_path: Path):
    draw_losses(metrics(tmp_path, [9 - step / 20 for step in range(100)], validated=False), tmp_path / "loss.png")
    drawn = pixels(tmp_path / "loss.png", TRAINING)
    drawn = drawn[drawn[:, 0] > 120]  # below the legend
    left, right = drawn[drawn[:, 1] < np.quantile(drawn[:, 1], 0.2)], drawn[drawn[:, 1] > np.quantile(drawn[:, 1], 0.8)]
    assert left[:, 0].mean() < right[:, 0].mean(), "rows of an image count from the top"
    assert len(pixels(tmp_path / "loss.png", VALIDATION)) == 0


def test_steps_without_a_finite_loss_are_passed_over(tmp_path: Path):
    losses = [math.nan if step % 7 == 3 else 5.0 for step in range(50)]
    draw_losses(metrics(tmp_path, losses), tmp_path / "loss.png")
    assert len(pixels(tmp_path / "loss.png", TRAINING)) > 500


@pytest.mark.parametrize("losses", [[], [math.nan, math.inf]], ids=["no rows", "nothing finite"])
def test_nothing_to_draw_is_said(tmp_path: Path, losses: list[float]):
    with pytest.raises(ConfigError, match="no finite loss"):
        draw_losses(metrics(tmp_path, losses), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_a_long_run_is_drawn_in_short_time_and_looks_the_same(tmp_path: Path):
    """50,000 steps on the way of 100: the curve takes the same pixels, but for the line's edge."""
    pictures = []
    for name, count in (("short", 100), ("long", 50_000)):
        (tmp_path / name).mkdir()
        losses = [9 - 5 * step / count for step in range(count)]
        start = time.process_time()
        draw_losses(metrics(tmp_path / name, losses, validated=False), tmp_path / f"{name}.png")
        assert time.process_time() - start < 15
        pictures.append(pixels(tmp_path / f"{name}.png", TRAINING))
    short, long = ({(row // 4, column // 4) for row, column in drawn if row > 120} for drawn in pictures)
    assert len(short & long) > 0.8 * max(len(short), len(long))


def test_one_row_is_enough(tmp_path: Path):
    draw_losses(metrics(tmp_path, [5.0]), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_the_command_draws_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    metrics(tmp_path, [5.0, 4.0])
    monkeypatch.setattr("sys.argv", ["plots", str(tmp_path), str(tmp_path / "mine.png"), "--title", "mine"])
    main()
    assert (tmp_path / "mine.png").exists()
