"""Run by test_during.py in each of several processes: every layout trains with and without evaluations.

    RANK=.. WORLD_SIZE=.. MASTER_ADDR=.. python during_rank.py SETTINGS.json PORT...
"""

import json
import os
import sys
from pathlib import Path

from kan_train.config.compose import compose_train
from kan_train.engine.trainer import train
from kan_train.evaluation.during import task_evaluator


def main() -> None:
    told = json.loads(Path(sys.argv[1]).read_text())
    ports = iter(sys.argv[2:])
    for name, overrides in told["layouts"].items():
        runs = {name: told["evaluate"]} | ({f"{name}-without": []} if name in told["without"] else {})
        for run, more in runs.items():
            os.environ["MASTER_PORT"] = next(ports)
            config = compose_train([*told["settings"], *overrides, *more, f"run.name={run}"], [], world_size=int(os.environ["WORLD_SIZE"]))
            assert train(config, make_evaluator=task_evaluator).finished


main()
