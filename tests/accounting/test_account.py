"""Every second of every device is in one bucket, on ledgers written by hand."""

from pathlib import Path

import pytest

from kan_train.accounting.account import account_of, read_account
from kan_train.accounting.money import cost_of
from kan_train.accounting.prices import chosen_price
from kan_train.config import ConfigError

from .ledgers import T0, attempt, check_invariants, row, seconds_of

# Two devices; saved at step 4, killed after step 8; goes on with four devices from step 4, and is stopped at step 6.
KILLED = [
    row("segment_start", 0.0, origin="new", process_seconds=10.0),
    row("weights", 1.0),
    row("steps", 10.0, step=4, tokens=400, first_step=1, steps=4, seconds_step=8.0, seconds_data=1.0),
    row("save", 12.0, step=4, tokens=400, seconds=1.5, seconds_waiting=0.0),
    row("validation", 17.0, step=4, tokens=400, seconds=4.0),
    row("steps", 25.0, step=8, tokens=800, first_step=5, steps=4, seconds_step=8.0, seconds_data=2.0),
]
RESUMED = [
    row("segment_start", 0.0, 2, world_size=4, begun=T0 + 100, step=4, tokens=400, origin="resumed from x", process_seconds=20.0),
    row("restart", 0.0, 2, world_size=4, begun=T0 + 100, step=4, tokens=400, lost_steps=4),
    row("steps", 3.0, 2, world_size=4, begun=T0 + 100, step=6, tokens=600, first_step=5, steps=2, seconds_step=2.5, seconds_data=0.5),
    row("save", 4.0, 2, world_size=4, begun=T0 + 100, step=6, tokens=600, seconds=0.75, seconds_waiting=0.0),
    row("segment_end", 4.25, 2, world_size=4, begun=T0 + 100, step=6, tokens=600, status="interrupted"),
]


def test_a_restart_makes_replayed_steps_of_those_after_the_checkpoint():
    before = account_of(KILLED)
    assert seconds_of(before) == {"start-up": 22, "step": 26, "data": 6, "saving": 3, "validation": 8, "idle": 5}
    assert before.device_seconds == 2 * 35
    assert (before.steps_retained, before.tokens_retained, before.tokens_processed) == (8, 800, 800)
    account = account_of([*KILLED, *RESUMED])
    check_invariants(account)
    assert [start.status for start in account.starts] == ["killed", "interrupted"]
    assert [(start.devices, start.seconds) for start in account.starts] == [(2, 35), (4, 24.25)]
    assert seconds_of(account) == {
        "start-up": 22 + 80, "step": 2 * 7 + 4 * 2, "data": 2 * 1 + 4 * 0.5, "saving": 3 + 3, "validation": 8, "replayed": 2 * 8, "idle": 5 + 4 * 1.0,
    }  # fmt: skip
    assert (account.steps_retained, account.steps_processed, account.tokens_retained, account.tokens_processed) == (6, 10, 600, 1000)
    assert account.goodput == pytest.approx(22 / (70 + 97))


def test_a_launcher_knows_the_time_before_and_after():
    """10 s of launching, a tail of 7.5 s after the kill, a start that died in its health check, and one whose end nobody saw."""
    attempts = [
        attempt("submitted", T0 - 99, nodes=1, processes_per_node=2),
        attempt("started", T0 - 20), attempt("ended", T0 + 25 + 7.5), attempt("requeued", T0 + 33),
        attempt("started", T0 + 40, 1), attempt("unhealthy", T0 + 44, 1, host="a", problem="b"), attempt("ended", T0 + 46, 1),
        attempt("started", T0 + 70, 2), attempt("ended", T0 + 900, 2, seen=False),
    ]  # fmt: skip
    account = account_of([*KILLED, *RESUMED], attempts)
    check_invariants(account)
    alone = account_of([*KILLED, *RESUMED]).buckets
    added = {bucket: seconds - alone[bucket] for bucket, seconds in account.buckets.items() if seconds != alone[bucket]}
    assert added == {"start-up": 2 * 10 + 2 * 6 + 4 * 10, "idle": 2 * 7.5}
    assert [(start.segment, start.status, start.devices, start.device) for start in account.starts] == [
        (1, "killed", 2, "NVIDIA H200"), (None, "never began", 2, "NVIDIA H200"), (2, "interrupted", 4, "NVIDIA H200"),
    ]  # fmt: skip
    seen = account_of([*KILLED, *RESUMED], [*attempts[:-1], attempt("ended", T0 + 100 + 4.25 + 3, 2)])
    assert seen.buckets["shutdown"] == 4 * 3
    running = account_of([*KILLED, *RESUMED], attempts[:-1])
    assert running.buckets == account.buckets, "a start that goes on counts up to its last event"


def test_processes_that_start_again_by_themselves_share_a_start_of_the_launcher():
    attempts = [attempt("started", T0 - 11), attempt("ended", T0 + 110)]
    account = account_of([*KILLED, *RESUMED], attempts)
    check_invariants(account)
    assert [start.seconds for start in account.starts] == [11 + 80, 20 + 4.25 + 5.75], "from the first start on to the second, and to the end"
    assert sum(start.seconds for start in account.starts) == 121


def test_a_rewind_throws_steps_away_and_its_save_is_counted_once():
    events = [
        row("segment_start", 0.0, origin="new", process_seconds=0.0),
        row("steps", 10.0, step=10, tokens=1000, first_step=1, steps=10, seconds_step=10.0, seconds_data=0.0),
        row("save_wait", 12.0, step=10, tokens=1000, seconds=2.0),
        row("save", 17.0, step=6, tokens=1000, seconds=3.0, seconds_waiting=0.0),
        row("rewind", 17.0, step=6, tokens=600, from_step=10, seconds=5.0),
        row("steps", 19.0, step=8, tokens=800, first_step=7, steps=2, seconds_step=2.0, seconds_data=0.0),
        row("validation_stopped", 20.0, step=8, tokens=800, seconds=0.5),
        row("segment_end", 21.0, step=8, tokens=800, status="failed"),
    ]  # fmt: skip
    account = account_of(events)
    check_invariants(account)
    assert seconds_of(account) == {"step": 16, "saving": 10, "replayed": 12, "validation": 1, "idle": 3}
    assert (account.steps_retained, account.steps_processed, account.rewinds) == (8, 12, 1)
    assert (account.tokens_retained, account.tokens_processed) == (800, 1200)


def test_a_hang_lasts_from_the_last_sign_of_progress_to_the_end():
    steps = row("steps", 480.0, step=3, tokens=300, first_step=1, steps=3, seconds_step=6.0, seconds_data=0.0)
    events = [row("segment_start", 0.0, origin="new", process_seconds=1.0), steps, row("hang", 480.0, step=3, tokens=300, report="r", summary="s")]
    account = account_of(events, [attempt("started", T0 - 1), attempt("ended", T0 + 490)])
    assert seconds_of(account) == {"start-up": 2, "step": 12, "hang": 2 * (474 + 10)}
    assert account.starts[0].status == "hung"


def test_a_run_that_begins_again_from_other_weights_keeps_nothing_of_before():
    branched = [event | {"segment": 2} for event in KILLED]
    branched[0] |= {"origin": "branched from y", "step": 50, "tokens": 5000}
    branched[2] |= {"first_step": 51, "step": 54, "tokens": 5400}
    account = account_of([*KILLED, *branched[:3]])
    assert (account.steps_retained, account.tokens_retained, account.tokens_processed) == (4, 400, 1200)


def test_steps_in_the_middle_of_what_was_told_together_are_kept_by_their_number():
    """Ten steps in one event; the run goes on from step 6, and then from step 3."""
    ten = row("steps", 10.0, step=10, tokens=1000, first_step=1, steps=10, seconds_step=10.0, seconds_data=0.0)
    events = [row("segment_start", 0.0, origin="new", process_seconds=0.0), ten]
    for segment, step, kept in ((2, 6, 6), (3, 3, 3)):
        events.append(row("segment_start", 0.0, segment, begun=T0 + 100 * segment, step=step, tokens=100 * step, origin="resumed from x"))
        account = account_of(events)
        assert (account.steps_retained, account.steps_processed, account.tokens_retained) == (kept, 10, 100 * kept)
        assert seconds_of(account) == {"step": 2 * kept, "replayed": 2 * (10 - kept)}


def test_steps_that_were_saved_and_never_told_count_without_their_time():
    """Killed after a save was on the disk and before it was in the ledger: the next start goes on beyond what is known."""
    start = row("segment_start", 0.0, 2, begun=T0 + 100, step=11, tokens=1100, origin="resumed from x", process_seconds=0.0)
    more = row("steps", 2.0, 2, begun=T0 + 100, step=12, tokens=1200, first_step=12, steps=1, seconds_step=2.0, seconds_data=0.0)
    account = account_of([*KILLED, start, more])
    check_invariants(account)
    assert (account.steps_retained, account.steps_processed, account.tokens_retained, account.tokens_processed) == (12, 12, 1200, 1200)
    assert seconds_of(account)["step"] == 26 + 4
    back = row("segment_start", 0.0, 3, begun=T0 + 200, step=10, tokens=1000, origin="resumed from x", process_seconds=0.0)
    account = account_of([*KILLED, start, more, back])
    assert (account.steps_retained, account.steps_processed, account.tokens_retained, account.tokens_processed) == (10, 12, 1000, 1200)


def test_old_ledgers_are_read():
    events = [{name: value for name, value in event.items() if name not in ("process_seconds", "seconds_data")} for event in KILLED]
    account = account_of(events)
    check_invariants(account)
    assert account.device_seconds == 2 * 25


def test_seconds_that_do_not_fit_are_told_and_in_no_bucket():
    events = [row("segment_start", 0.0, origin="new", process_seconds=0.0), row("save", 5.0, seconds=4.0), row("validation", 5.0, seconds=3.0)]
    account = account_of(events)
    check_invariants(account)
    assert account.starts[0].overbooked == 2.0
    assert seconds_of(account) == {"saving": 8, "validation": 2}


def test_a_run_without_a_ledger_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="has no events yet"):
        read_account(tmp_path)


# --- money ----------------------------------------------------------------------------------------------------------------------------------------------


def test_dollars_follow_the_device_hours():
    account = account_of([*KILLED, *RESUMED])
    cost = cost_of(account, "3.6")
    assert cost.total == pytest.approx(167e-3)
    assert sum(cost.buckets.values()) == pytest.approx(cost.total)
    assert cost.buckets["replayed"] == pytest.approx(16e-3)
    assert cost.per_million_processed == pytest.approx(167e-3 / 1000 * 1e6)
    assert cost.per_million_retained == pytest.approx(167e-3 / 600 * 1e6)
    assert cost_of(account, "spot").total == pytest.approx(167 / 3600 * 1.45), "of an H200"
    with pytest.raises(ConfigError, match=r"--price=capacity_blocks: there is no price of 'NVIDIA H200' in capacity_blocks; there is on_demand"):
        cost_of(account, "capacity_blocks")


def test_each_start_costs_what_it_recorded():
    with pytest.raises(ConfigError, match="start 1 of the run recorded no price; use --price"):
        cost_of(account_of([*KILLED, *RESUMED]))
    first, second = (chosen_price(text, "NVIDIA H200").as_row() for text in ("3.6", "7.2"))
    events = [KILLED[0] | {"price": first}, *KILLED[1:], RESUMED[0] | {"price": second}, *RESUMED[1:]]
    cost = cost_of(account_of(events))
    assert cost.total == pytest.approx(70e-3 + 2 * 97e-3)
    assert [price.per_device_hour for price in cost.prices] == [3.6, 7.2]
    # One that died before its loop costs what the next one says.
    cost = cost_of(account_of(events, [attempt("started", T0 + 40), attempt("ended", T0 + 50)]))
    assert cost.total == pytest.approx(70e-3 + 2 * 97e-3 + 4 * 10 * 2e-3)
