"""Run by test_budget.py on every rank: a run that a hook of the first rank alone ends; one JSON line with what this rank made of it."""

import json
import sys
from typing import Any

from kan_train.config.compose import compose_train
from kan_train.engine.trainer import train


class Enough:
    """A hook that has enough after five steps, as the one that counts the money has."""

    def __init__(self) -> None:
        self.steps = 0

    def on_start(self, start: dict[str, Any]) -> None:
        pass

    def on_step(self, row: dict[str, Any]) -> None:
        self.steps = row["step"]

    def on_event(self, kind: str, fields: dict[str, Any]) -> None:
        pass

    def totals(self) -> dict[str, float]:
        return {}

    def on_end(self, end: dict[str, Any]) -> None:
        pass

    def over_budget(self) -> str:
        return "enough is enough" if self.steps >= 5 else ""


if __name__ == "__main__":
    result = train(compose_train(sys.argv[1:], [], world_size=2), lambda config, run_dir, runtime: [Enough()] if runtime.is_first else [])
    print(json.dumps({"code": result.exit_code, "steps": result.steps, "finished": result.finished}))
