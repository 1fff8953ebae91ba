"""kill -9 of a random rank at a random moment, and the same command again (docs/reliability.md): eleven kills of those of benchmarks/kills.py."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from layout_matrix.pool import Pool
from recovery_proofs.entry import SAMPLES
from recovery_proofs.episode import CASES, EVERY, Case, Episode, Kill, judge_kill, judge_reads, judge_start, run_killed, run_whole
from recovery_proofs.evidence import Evidence
from recovery_proofs.jobs import Forked

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("layouts")]

RUNS: dict[str, tuple[str, ...]] = {
    "plain": ("save", "start-up", "save", "step"),
    "dp2-zero2": ("save", "step", "start-up", "save"),
    "dp3-zero1-sync": ("step", "save", "save"),
}
"""Layout, and what each kill of its run aims at."""

Left = tuple[Evidence, Episode, Evidence]


def short(name: str) -> Case:
    """A case with as many steps as the kills of these tests leave room for."""
    return dataclasses.replace(CASES[name], steps=6 * EVERY)


@pytest.fixture(scope="module")
def left(pool: Pool, corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Left]:
    """Of a layout: what the run left that nobody killed; what came of the one that was killed, and what that left."""
    kept: dict[str, Left] = {}

    def of(name: str) -> Left:
        if name not in kept:
            folder, launcher = tmp_path_factory.mktemp(name), Forked(pool)
            whole = run_whole(short(name), launcher, corpora, folder / "whole")
            episode = run_killed(short(name), launcher, corpora, folder / "killed", whole, aims=RUNS[name], seed=name)
            kept[name] = whole.evidence, episode, Evidence(folder / "killed" / "run", folder / "killed" / "samples")
        return kept[name]

    return of


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_not(name, left):
    whole, episode, killed = left(name)
    assert episode.failures == []
    assert [kill.aim for kill in episode.kills] == list(RUNS[name])
    assert len(killed.starts()) > 1
    assert max(kill.repeated for kill in episode.kills) <= short(name).most_repeated
    restarts = [kill.restart_seconds for kill in episode.kills if kill.restart_seconds is not None]
    assert 0 < max(restarts) < 30
    # What the comparison rests on is there.
    assert [row["step"] for row in whole.rows()] == list(range(1, 6 * EVERY + 1))
    assert len(list(whole.samples.iterdir())) == short(name).world


def _swap_checkpoints(killed: Evidence) -> None:
    older, newer = sorted(killed.checkpoints.iterdir())
    shutil.rmtree(newer)
    shutil.copytree(older, newer)


def _change_a_loss(killed: Evidence) -> None:
    path = killed.run_dir / "metrics.jsonl"
    first, *rest = path.read_text().splitlines()
    row = json.loads(first)
    path.write_text("\n".join([json.dumps(row | {"loss": row["loss"] * (1 + 1e-7)}), *rest]) + "\n")


def _drop_the_last_rows(killed: Evidence) -> None:
    path = killed.run_dir / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))


def _forget_a_batch(killed: Evidence) -> None:
    path = killed.samples / SAMPLES.format(rank=0)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if json.loads(line)["cursor"] != 24) + "\n")


SPOILT: dict[str, Callable[[Evidence], object]] = {
    "leftovers: .rank": lambda killed: (killed.run_dir / ".rank-00000.tmp").touch(),
    "leftovers: step-00000018/.rank": lambda killed: (killed.checkpoints / "step-00000018" / ".rank-00000-000-0123abcd.safetensors.tmp").touch(),
    "leftovers: step-00000012/": lambda killed: (killed.checkpoints / "step-00000012").mkdir(),
    "files: notes": lambda killed: (killed.run_dir / "notes").touch(),
    "files: checkpoints": lambda killed: shutil.rmtree(killed.checkpoints / "step-00000015"),
    "tensors of step-00000018: exp_avg/": _swap_checkpoints,
    "state of step-00000018": _swap_checkpoints,
    "rows: other figures in steps [1]": _change_a_loss,
    "steps: [1, 2": _drop_the_last_rows,
    "samples: samples-0.jsonl has other ones in the batches at [24]": _forget_a_batch,
}
"""The beginning of what must be said, and what is done to a run to deserve it."""


@pytest.mark.parametrize("said", SPOILT)
def test_what_a_run_lost_is_found(said, left, tmp_path):
    whole, _, killed = left("plain")
    shutil.copytree(killed.run_dir.parent, tmp_path / "copy")
    copy = Evidence(tmp_path / "copy" / "run", tmp_path / "copy" / "samples")
    assert copy.differences(whole) == []
    SPOILT[said](copy)
    assert any(text.startswith(said) for text in copy.differences(whole)), copy.differences(whole)


def test_a_damaged_checkpoint_and_a_wrong_start_are_found(left, tmp_path):
    """A start must go on from the newest checkpoint of which every byte is right, and do no more steps again than are allowed."""
    whole, _, _ = left("plain")
    shutil.copytree(whole.run_dir.parent, tmp_path / "copy")
    copy, episode = Evidence(tmp_path / "copy" / "run", tmp_path / "copy" / "samples"), Episode()
    older, newer = sorted(copy.checkpoints.iterdir())
    assert copy.newest_valid() == (newer, [])
    tensors = next(newer.glob("rank-*"))
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    found, wrong = copy.newest_valid()
    assert (found, len(wrong)) == (older, 1)

    judge_start(Kill(aim="step", rank=0, terminated=False), copy, 0, None, episode)
    assert episode.failures == []  # it said that it was new
    judge_start(Kill(aim="step", rank=0, terminated=False), copy, 0, older, episode)
    assert [text.partition(":")[0] for text in episode.failures] == ["origin"]
    judge_reads(copy, {}, 0, episode)
    assert len(episode.failures) == 1  # the whole run began with the first sample
    judge_reads(copy, {name: cursors[:3] for name, cursors in copy.reads().items()}, 24, episode)
    assert [text.partition(":")[0] for text in episode.failures] == ["origin", "cursor"]
    shutil.rmtree(older)
    judge_kill(Kill(aim="step", rank=0, terminated=False), short("plain"), copy, 0, set(), episode)
    assert [text.partition(":")[0] for text in episode.failures] == ["origin", "cursor", "checkpoint", "repeated"]
