"""Which steps of a ledger were for the model that there is, and which were thrown away: by a restart from an older checkpoint, or by a rewind."""

from collections.abc import Iterable
from dataclasses import dataclass

from kan_train.accounting.lines import Row


@dataclass(kw_only=True)
class Stretch:
    """Steps in a row, as one `steps` event tells of them."""

    segment: int
    """The start of the run in which they were done."""
    first: int
    """The first of them."""
    last: int
    """The last of them."""
    tokens: int
    """Tokens of all of them."""
    seconds: float
    """Wall-clock of all of them; 0 where nobody saw them: done after the last event of a start that was killed, and saved."""
    seconds_data: float
    """Of it waiting for data."""
    kept_last: int
    """The last of them that was not thrown away; below `first` where all were."""

    @property
    def steps(self) -> int:
        """How many they are."""
        return self.last - self.first + 1

    @property
    def kept(self) -> int:
        """How many of them were not thrown away."""
        return max(0, self.kept_last - self.first + 1)

    @property
    def share(self) -> float:
        """The share that was not thrown away."""
        return self.kept / self.steps

    @property
    def kept_tokens(self) -> int:
        """Tokens of those."""
        return round(self.tokens * self.share)


def stretches(events: Iterable[Row]) -> list[Stretch]:
    """All steps that the events of a ledger tell of, in the order in which they were done.

    A step counts as thrown away from the event on that goes back before it, a segment_start or a rewind, whether or not it was done again by then.
    Those that a killed start did after its last save count as kept until the next start: only that one says where it goes on.
    """
    found: list[Stretch] = []
    line: list[Stretch] = []  # what leads to the present step
    step, tokens, begun = 0, 0, False
    for event in events:
        kind = event["event"]
        if kind == "steps":
            row = _stretch(event, event["first_step"], tokens)
            found.append(row)
            line.append(row)
        elif kind in ("segment_start", "rewind"):
            if kind == "segment_start" and not event["origin"].startswith("resumed"):
                _go_back(line, -1)  # a beginning: nothing of before leads to it
            elif begun and event["step"] > step:
                unseen = _stretch({"segment": event["segment"] - 1} | {name: event[name] for name in ("step", "tokens")}, step + 1, tokens)
                found.append(unseen)
                line.append(unseen)
            _go_back(line, event["step"])
            begun = True
        else:
            continue  # others may name a step whose tokens are told later
        step, tokens = event["step"], event["tokens"]
    return found


def _stretch(event: Row, first: int, tokens_before: int) -> Stretch:
    return Stretch(
        segment=event["segment"],
        first=first,
        last=event["step"],
        tokens=event["tokens"] - tokens_before,
        seconds=event.get("seconds_step", 0.0),
        seconds_data=event.get("seconds_data", 0.0),
        kept_last=event["step"],
    )


def _go_back(line: list[Stretch], step: int) -> None:
    while line and line[-1].kept_last > step:
        line[-1].kept_last = step
        if line[-1].kept:
            return
        line.pop()
