"""What the run can be shown to do, as a report tells it: the results of `kan evaluate`, and accuracies over tokens where a run evaluated as it trained."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kan_train.accounting.lines import Row
from kan_train.evaluation.results import Result, evaluations_of
from kan_train.evaluation.statistics import wilson
from kan_train.report.figures import TOKENS, Picture, Trace, axis, colour, named, trace_of
from kan_train.report.history import History

PARTS = 8
"""Lines below a task: its categories, or its groups where they are no more."""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""Of a run's tasks, where its colour says which run it is."""


def table_of(histories: Sequence[History]) -> list[dict[str, Any]]:
    """Lines of the table: a task of a run each, and one for each of its parts. ConfigError where a result is damaged."""
    lines = []
    for history in histories:
        for result in evaluations_of(history.run_dir):
            own = {"run": history.name, "step": f"{result['step']:,}" if "step" in result else "", "date": result.get("date", "")[:10]}
            lines.append(own | _line(result["task"], result, result["metric"]))
            parts = result.get("categories") or result.get("groups", {})
            if len(parts) <= PARTS:
                lines += [_line(name, each, result["metric"]) | {"part": True, "run": "", "step": "", "date": ""} for name, each in parts.items()]
    return lines


def _line(name: str, result: Result, metric: str) -> dict[str, Any]:
    form = _share if "majority" in result["baselines"] else _figure
    value, interval, baselines = result[metric]["value"], result[metric]["interval"], result["baselines"]
    return {
        "task": name, "metric": metric, "value": form(value), "interval": "" if interval is None else " to ".join(map(form, interval)),
        "random": form(baselines["random"]), "majority": form(baselines["majority"]) if "majority" in baselines else "",
        "count": f"{result.get('questions', result.get('documents')):,}", "part": False,
    }  # fmt: skip


def _share(value: float) -> str:
    return f"{value:.1%}"


def _figure(value: float) -> str:
    return f"{value:.4f}"


def accuracy(histories: Sequence[History]) -> Picture | None:
    """Accuracies over tokens of the evaluations that training made, with intervals of 95%, and what chance reaches; None where it made none."""
    data: list[Trace] = []
    sentences, bands = [], []
    for number, history in enumerate(histories):
        measured = counting(history.ledger)
        rows = history.metrics.columns
        tasks = list(dict.fromkeys(task for event in measured for task in event["tasks"]))
        for place, task in enumerate(tasks):
            of_task = [event for event in measured if task in event["tasks"]]
            scores = [event["tasks"][task] for event in of_task]
            tokens = np.interp([event["step"] for event in of_task], rows["step"], rows["tokens"]) if len(rows["step"]) else np.zeros(len(of_task))
            hue = number + (place if len(histories) == 1 else 0)
            dash = DASHES[place % len(DASHES)] if len(histories) > 1 else "solid"
            label = named(histories, history, task)
            edges = np.array([wilson(score["right"], score["questions"]) for score in scores])
            for edge, fill in ((edges[:, 0], None), (edges[:, 1], "tonexty")):
                band = trace_of(tokens, edge, "", colour(hue, 0.0), width=0)
                bands.append(band | {"showlegend": False, "fill": fill, "fillcolor": colour(hue, 0.14), "hoverinfo": "skip", "hovertemplate": None})
            values = np.array([score["accuracy"] for score in scores])
            data.append(trace_of(tokens, values, label, colour(hue), dash=dash) | {"mode": "lines+markers", "marker": {"size": 6, "color": colour(hue)}})
            chance = trace_of(tokens[[0, -1]], np.full(2, scores[-1]["random"]), "", colour(hue, 0.7), dash="dot", width=1.2)
            data.append(chance | {"showlegend": False, "hoverinfo": "skip", "hovertemplate": None})
            low, high = edges[-1]
            sentences.append(f"{label} {values[-1]:.1%} ({low:.1%} to {high:.1%}; {scores[-1]['questions']:,} questions)")
    if not data:
        return None
    caption = f"At the end: {'; '.join(sentences)}. Measured while training; bands: 95% intervals (Wilson); dotted: choosing evenly."
    return Picture(
        id="accuracy", title="Accuracy on tasks", caption=caption, data=bands + data,
        layout={"xaxis": TOKENS, "yaxis": axis("accuracy", tickformat=".0%"), "showlegend": True},
    )  # fmt: skip


def counting(ledger: Sequence[Row]) -> list[Row]:
    """The evaluations of steps that no restart or rewind threw away, or that were done again, by step."""
    kept: dict[int, Row] = {}
    for event in ledger:
        if event["event"] in ("segment_start", "rewind"):
            kept = {step: one for step, one in kept.items() if step <= event["step"]}
        elif event["event"] == "evaluation":
            kept[event["step"]] = event
    return [kept[step] for step in sorted(kept)]
