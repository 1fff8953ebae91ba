"""Bad steps: counted, gone back from, and their samples never read again."""

import os
import signal

import pytest
import torch

from kan_train.checkpoint import folders, load_tensors, newest, read_manifest
from kan_train.config import Config, RecoveryConfig
from kan_train.data import open_training_data
from kan_train.engine import build_engine
from kan_train.engine.engine import StepResult
from kan_train.engine.exits import EXIT_BAD_STEPS, EXIT_STOPPED
from kan_train.engine.plain import PlainEngine
from kan_train.engine.progress import Progress
from kan_train.engine.recovery import judge, spike_level
from kan_train.engine.schedule import balance_rate, learning_rate_factor
from kan_train.parallel.runtime import single_process_runtime

from .test_trainer import make, run, weights  # noqa: F401  (make is a fixture)

STEPS = ("train.steps=14", "train.validate_every=0", "recovery.max_bad_steps=3")


def read_by_step(config: Config, steps: int) -> list[torch.Tensor]:
    """[sequences, T] of every step, from a loader of its own."""
    data = open_training_data(
        config.data, sequence_length=config.model.sequence_length, seed=config.run.seed, vocab_size=config.model.vocab_size
    )
    loader = data.loader(config.train.global_batch_size, config.train.micro_batch_size, 0, 1)
    read = [torch.cat([batch.tokens for batch in loader.next_step()]) for _ in range(steps)]
    loader.close()
    return read


@pytest.fixture
def poison(monkeypatch):
    """poison(sequences, added): any micro-batch that holds one of `sequences` [n, T] has `added` to its loss."""

    def poisoned(sequences: torch.Tensor, added: float) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        original = PlainEngine._forward

        def forward(engine, batch):
            loss, cross_entropy = original(engine, batch)
            if engine.model.training:
                seen.append(batch.tokens)
                if (batch.tokens[:, None] == sequences[None]).all(-1).any():
                    return loss + added, cross_entropy + added
            return loss, cross_entropy

        monkeypatch.setattr(PlainEngine, "_forward", forward)
        return seen

    return poisoned


def trained_without(config: Config, steps: int, left_out: list[int]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of `steps` steps that read the global batches 0, 1, ... but for those of `left_out`: a loop of its own."""
    batches = [batch for number, batch in enumerate(_batches(config, steps + len(left_out))) if number not in left_out]
    engine = build_engine(config, single_process_runtime(config))
    losses = []
    for step, batch in enumerate(batches):
        rate = config.optimizer.learning_rate * learning_rate_factor(config.optimizer.schedule, step, config.train.steps)
        losses.append(engine.train_step(batch, rate, balance_rate(config.model.grove, step, config.train.steps)).loss)
    return losses, {fragment.name: fragment.flat.clone() for fragment in engine.named_fragments()}


def _batches(config: Config, steps: int) -> list:
    data = open_training_data(
        config.data, sequence_length=config.model.sequence_length, seed=config.run.seed, vocab_size=config.model.vocab_size
    )
    loader = data.loader(config.train.global_batch_size, config.train.micro_batch_size, 0, 1)
    read = [loader.next_step() for _ in range(steps)]
    loader.close()
    return read


@pytest.mark.parametrize(("added", "settings"), [(float("nan"), ()), (100.0, ("recovery.spike=5", "recovery.window=10"))], ids=["nan", "spike"])
def test_a_run_goes_back_and_leaves_the_samples_of_bad_steps_out(make, poison, added, settings):  # noqa: F811
    """The samples of the global batches 10, 11 and 12 are poisoned: the run is that of a loop that never read them, bit for bit."""
    config = make(*STEPS, *settings)
    bad = [10, 11, 12]
    expected_losses, expected = trained_without(config, 14, bad)
    seen = poison(torch.cat([read_by_step(config, 13)[number] for number in bad]), added)
    result, watch = run(config)
    assert (result.finished, result.steps, result.exit_code) == (True, 14, 0)
    rewind = next(fields for kind, fields in watch.events if kind == "rewind")
    assert (rewind["from_step"], rewind["step"], rewind["bad_steps"], rewind["rewinds"]) == (13, 10, 3, 1)
    assert rewind["samples_left_out"] == [(40, 52)]
    losses = {row["step"]: row["loss"] for row in watch.rows}  # of a step done twice the later one
    assert list(losses.values()) == expected_losses
    found = weights(config)
    assert all(torch.equal(found[name].flatten(), flat) for name, flat in expected.items())
    assert sum(len(tokens) for tokens in seen) == (13 + 4) * 4


def test_a_run_that_stops_after_going_back_still_leaves_the_samples_out(make, poison):  # noqa: F811
    config = make(*STEPS)
    poison(torch.cat([read_by_step(config, 13)[number] for number in (10, 11, 12)]), float("nan"))
    rows: list[int] = []

    def stop_after_going_back(row) -> None:
        rows.append(row["step"])
        if rows.count(11) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    stopped, _ = run(config, after_step=stop_after_going_back)
    assert (stopped.exit_code, stopped.steps) == (EXIT_STOPPED, 11)
    finished, watch = run(config)
    assert (finished.finished, finished.steps) == (True, 14)
    assert not [kind for kind, _ in watch.events if kind in ("skipped_step", "rewind")]
    state = read_manifest(newest(finished.run_dir / "checkpoints")).state
    assert (state["progress"]["rewinds"], state["progress"]["skipped_steps"]) == (1, 3)
    assert state["loader"]["left_out"] == [[40, 52]]


def test_the_checkpoint_of_before_is_written_again_with_what_is_left_out(make, poison):  # noqa: F811
    """Killed at any moment after going back, a run finds it there; later checkpoints, of bad steps, are gone."""
    config = make(*STEPS, "recovery.max_rewinds=1")
    poison(torch.cat(read_by_step(config, 30)[10:30]), float("nan"))  # going back does not help
    result, watch = run(config)
    assert (result.finished, result.exit_code, result.steps) == (False, EXIT_BAD_STEPS, 13)
    assert [kind for kind, _ in watch.events if kind in ("skipped_step", "rewind")] == [*["skipped_step"] * 3, "rewind", *["skipped_step"] * 3]
    last = folders(result.run_dir / "checkpoints")[0]
    assert last.name == "step-00000010"
    assert read_manifest(last).state["loader"]["left_out"] == [[40, 52]]
    load_tensors(last, "")


def test_no_checkpoint_is_taken_amid_bad_steps(make, poison):  # noqa: F811
    config = make(*STEPS, "recovery.max_bad_steps=4", "checkpoint.every=1")
    poison(torch.cat([read_by_step(config, 10)[number] for number in (4, 5)]), float("nan"))
    result, _ = run(config)
    assert result.finished
    assert [path.name for path in reversed(folders(result.run_dir / "checkpoints"))] == [f"step-{n:08d}" for n in range(1, 15) if n not in (5, 6)]


def test_a_spike_is_far_above_the_losses_of_before():
    losses = [3.0, 3.1, 2.9, 3.0, 3.2, 2.8, 3.05, 2.95, 3.0, 3.0]
    # By hand: median 3.0; deviations 0, .1, .1, 0, .2, .2, .05, .05, 0, 0: median 0.05.
    assert spike_level(losses, 10) == pytest.approx(3.0 + 10 * 1.4826 * 0.05)
    assert spike_level([2.0] * 10, 20) == pytest.approx(2.02)


def test_what_is_usual_is_learnt_from_good_steps_alone():
    config, progress = RecoveryConfig(spike=5.0, window=10), Progress()

    def step(loss: float, *, skipped: bool = False) -> str | None:
        return judge(config, progress, StepResult(loss=loss, cross_entropy=loss, grad_norm=1.0, skipped=skipped))

    assert [step(3.0 + 0.01 * (n % 3)) for n in range(10)] == [None] * 10
    before = list(progress.recent_losses)
    assert [step(9.0), step(float("nan"), skipped=True), step(9.0)] == ["spike", "skipped", "spike"]
    assert (progress.bad_steps, progress.skipped_steps, progress.recent_losses) == (3, 1, before)
    assert step(3.01) is None
    assert (progress.bad_steps, progress.skipped_steps) == (0, 1)


def test_nothing_is_a_spike_before_enough_steps_or_where_it_is_off():
    for config in (RecoveryConfig(spike=5.0, window=10), RecoveryConfig(spike=0.0, window=10)):
        progress = Progress()
        kinds = {judge(config, progress, StepResult(loss=x, cross_entropy=x, grad_norm=1.0, skipped=False)) for x in [1.0] * 9 + [50.0]}
        assert kinds == {None}
