"""The loss curve of a run, from its metrics.jsonl.

    python -m kan_train.accounting.plots runs/first loss.png
"""

import argparse
import math
import statistics
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from kan_train.accounting.lines import Row
from kan_train.accounting.sinks.jsonl import METRICS, read_metrics
from kan_train.config import ConfigError

TRAINING, VALIDATION, GRID = "#4878a8", "#c44e52", "#dddddd"

POINTS = 2000
"""Points of the training curve."""


def draw_losses(metrics: Path, picture: Path, *, title: str = "loss") -> None:
    """Draw training and validation loss, nats a token, against tokens into the PNG `picture`.

    The training loss is drawn twice: pale as measured, and a median over neighbouring steps, which a single bad batch does not move.
    ConfigError where `metrics` holds no finite loss.
    """
    rows = read_metrics(metrics, names=("tokens", "cross_entropy", "loss", "validation/loss"))
    training, validation = _curve(rows, "cross_entropy") or _curve(rows, "loss"), _curve(rows, "validation/loss")
    if not training:
        raise ConfigError(f"{metrics} holds no finite loss to draw")
    # Not pyplot: it keeps figures in global state and may open a window.
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tokens, losses = zip(*_thinned(training), strict=True)
    axes.plot(tokens, losses, color=TRAINING, alpha=0.3, linewidth=0.8)
    axes.plot(tokens, _medians(losses), color=TRAINING, linewidth=1.6, label="training (running median)")
    if validation:
        last = f"validation ({validation[-1][1]:.3f} at the end)"
        axes.plot(*zip(*validation, strict=True), color=VALIDATION, linewidth=1.6, marker="o", markersize=4, label=last)
    axes.set(title=title, xlabel="tokens", ylabel="loss, nats a token")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture)


def _curve(rows: list[Row], name: str) -> list[tuple[float, float]]:
    """(tokens, value) of the rows where the value is a finite number."""
    return [(row["tokens"], row[name]) for row in rows if row.get(name) is not None and math.isfinite(row[name])]


def _thinned(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points: the medians of as many parts of the curve. More would not be seen, and would take long to draw."""
    size = -(-len(curve) // POINTS)
    if size <= 1:
        return curve
    parts = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(statistics.median(x for x, _ in part), statistics.median(y for _, y in part)) for part in parts]


def _medians(values: tuple[float, ...]) -> list[float]:
    """Median over a window that grows with the curve: 1/50 of it on each side, less at the ends."""
    reach = len(values) // 50
    return [statistics.median(values[max(0, i - min(reach, i)) : i + min(reach, i) + 1]) for i in range(len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--title", default="loss")
    arguments = parser.parse_args()
    draw_losses(arguments.run / METRICS, arguments.picture, title=arguments.title)


if __name__ == "__main__":
    main()
