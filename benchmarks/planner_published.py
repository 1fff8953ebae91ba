"""Published training runs, planned: calibrated on some, the others predicted; all residuals, beside those of one MFU for all.

    python benchmarks/planner_published.py

Needs no device. Errors are logarithms of predicted over published speed: +0.10 is 10% too fast.
"""

import argparse
import math
from typing import Any

from common import write_result

from kan_train.planner.published import Prediction, calibrated_share, mean_error, predictions, rows


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    share, by_name = calibrated_share(), {row.name: row for row in rows()}
    results: list[dict[str, Any]] = []
    summary: dict[str, dict[str, float]] = {}
    for method, leave_one_out in (("calibrated on some", False), ("leave one out", True)):
        found = predictions(leave_one_out=leave_one_out)
        print(f"{method}: tokens/s a device, published, planned (error), constant MFU (error)")
        for one in found:
            print(f"  {one.name:15s} {one.published:7.0f} {one.planned:7.0f} ({one.planned_error:+6.1%}) {one.constant:7.0f} ({one.constant_error:+6.1%})")
            results.append(_row(one, method, by_name[one.name].source, by_name[one.name].mfu))
        bf16 = [one for one in found if not by_name[one.name].fp8]
        for group, chosen in (("all", found), ("without FP8", bf16)):
            errors = {kind: mean_error([getattr(one, f"{kind}_error") for one in chosen]) for kind in ("planned", "constant")}
            summary[f"{method}, {group}"] = errors | {"rows": len(chosen), "planner_wins": float(errors["planned"] < errors["constant"])}
            print(f"  mean absolute log error, {group}: planner {errors['planned']:.3f}, constant MFU {errors['constant']:.3f}")
    claim = "the planner, calibrated on some published runs, predicts the others better than one MFU for all"
    holds = summary["calibrated on some, all"]["planner_wins"] == 1.0
    calibration = share.as_json() | {"rows": [row.name for row in rows() if row.calibrates]}
    write_result("planner-published", claim=claim, config={}, rows=results, summary=summary, holds=holds, calibration=calibration)


def _row(one: Prediction, method: str, source: str, mfu: float) -> dict[str, Any]:
    return {
        "name": f"{one.name}, {method}", "published_tokens_per_second": one.published, "planned": one.planned, "constant_mfu": one.constant,
        "planned_log_error": math.log(one.planned / one.published), "constant_log_error": math.log(one.constant / one.published),
        "share_of_peak": one.share, "published_mfu": mfu, "source": source,
    }  # fmt: skip


if __name__ == "__main__":
    main()
