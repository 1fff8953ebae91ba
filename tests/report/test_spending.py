"""What had been spent at a step: on a ledger whose every second is known."""

from typing import Any

import numpy as np
import pytest

from kan_train.accounting.account import account_of
from kan_train.accounting.prices import chosen_price
from kan_train.report.spending import Spending

T0 = 1.8e9
PRICE = chosen_price("3.6", "gpu", setting="accounting.price").as_row()  # a tenth of a cent a second


def event(kind: str, elapsed: float, segment: int, begun: float, devices: int = 2, **fields: Any) -> dict[str, Any]:
    where = {"world_size": devices, "device": "gpu", "host": "node", "pid": 1}
    return {"event": kind, "time": T0 + begun + elapsed, "elapsed": elapsed, "segment": segment, "step": 0, "tokens": 0, **where, **fields}


def steps(elapsed: float, segment: int, begun: float, first: int, last: int, seconds: float, devices: int = 2) -> dict[str, Any]:
    return event("steps", elapsed, segment, begun, devices, first_step=first, step=last, tokens=10 * last, steps=last - first + 1, seconds_step=seconds)


# The first start: 10 s of starting; steps 1 to 4 in 8 s, a save of 3 s, steps 5 to 6 in 4 s, a rewind to step 4 in 1 s, steps 5 to 8 in 8 s; killed.
# The second, of 4 devices: 5 s of starting, from step 6 on in two steps of 1 s each, and an end.
LEDGER = [
    event("segment_start", 0.0, 1, 10.0, origin="new", process_seconds=10.0, price=PRICE),
    steps(11.0, 1, 10.0, 1, 4, 8.0),
    event("save", 11.0, 1, 10.0, step=4, tokens=40, seconds=3.0),
    steps(15.0, 1, 10.0, 5, 6, 4.0),
    event("rewind", 16.0, 1, 10.0, step=4, tokens=40, from_step=6, bad_steps=2, rewinds=1, seconds=1.0),
    steps(24.0, 1, 10.0, 5, 8, 8.0),
    event("segment_start", 0.0, 2, 100.0, 4, origin="resumed from step 6", step=6, tokens=60, process_seconds=5.0, price=PRICE),
    steps(2.0, 2, 100.0, 7, 8, 2.0, 4),
    event("segment_end", 2.5, 2, 100.0, 4, step=8, tokens=80, status="finished"),
]


def spending(choice: str | None = None, ledger: list[dict[str, Any]] = LEDGER, attempts: list[dict[str, Any]] | None = None) -> Spending:
    return Spending(account_of(ledger, attempts or []), ledger, attempts or [], choice)


def at(found: Spending, segment: int, rewinds: int, step: float) -> list[float]:
    seconds, dollars, when = found.at_steps(np.array([segment]), np.array([rewinds]), np.array([step]))
    return [float(seconds[0]), float(dollars[0]), float(when[0]) - T0]


@pytest.mark.parametrize(
    ("segment", "rewinds", "step", "wall"),
    [
        (1, 0, 1, 12.0), (1, 0, 2, 14.0), (1, 0, 4, 18.0),
        (1, 0, 5, 23.0),  # after the save of 3 s, which step 4 had not waited for
        (1, 0, 6, 25.0), (1, 1, 5, 28.0), (1, 1, 8, 34.0),
    ],
)  # fmt: skip
def test_a_step_is_known_by_its_second(segment: int, rewinds: int, step: int, wall: float):
    """Two devices, 10 s before the loop began, of which the clock of `time` knows nothing."""
    device_seconds, dollars, when = at(spending(), segment, rewinds, step)
    assert device_seconds == pytest.approx(2 * wall, abs=1e-3)
    assert dollars == pytest.approx(2 * wall * 1e-3, abs=1e-6)
    assert when == pytest.approx(wall, abs=1e-3)


def test_a_later_start_pays_for_the_earlier_ones():
    first = 2 * 34.0
    assert at(spending(), 2, 0, 7)[0] == pytest.approx(first + 4 * 6.0, abs=1e-3)
    assert at(spending(), 2, 0, 8)[0] == pytest.approx(first + 4 * 7.0, abs=1e-3)
    assert at(spending("7.2"), 2, 0, 8)[1] == pytest.approx(2 * at(spending(), 2, 0, 8)[1])
    assert account_of(LEDGER).device_seconds == pytest.approx(first + 4 * 7.5, abs=1e-3)


def test_what_the_launcher_saw_counts_from_its_beginning():
    attempts = [
        {"event": name, "time": T0 + when, "job": 1, "scheduler": "slurm", "job_id": "7", "restart": restart}
        for name, when, restart in (("started", -20.0, 0), ("ended", 40.0, 0), ("started", 90.0, 1), ("ended", 104.0, 1))
    ]
    found = spending(attempts=attempts)
    assert at(found, 1, 0, 1)[0] == pytest.approx(2 * 32.0, abs=1e-3)
    assert at(found, 2, 0, 8)[0] == pytest.approx(2 * 60.0 + 4 * 12.0, abs=1e-3)


def test_steps_that_the_ledger_does_not_have_yet_are_not_guessed():
    seconds, dollars, when = spending().at_steps(np.array([2.0, 3.0]), np.array([0.0, 0.0]), np.array([9.0, 9.0]))
    assert np.isnan([seconds, dollars, when]).all()


def test_without_a_price_there_are_seconds_alone():
    unpriced = [{name: value for name, value in row.items() if name != "price"} for row in LEDGER]
    found = spending(ledger=unpriced)
    assert not found.has_dollars
    assert at(found, 2, 0, 8)[0] == at(spending(), 2, 0, 8)[0]
    assert found.of_seconds(unpriced[2], 3.0) is None
    assert spending().of_seconds(LEDGER[2], 3.0) == pytest.approx(6e-3)
