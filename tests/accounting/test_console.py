"""What is shown on a terminal and in a file."""

import io
import math
import subprocess
import sys
from pathlib import Path

import pytest

from kan_train.accounting.sinks.console import ConsoleSink
from kan_train.config import Config


def run(config: Config, *, terminal: bool, steps: int = 40, first: int = 0, bad_step: int | None = None) -> str:
    """What is printed while a run of `steps` steps goes on from `first`, a tenth of a second and 1,000 tokens a step."""
    output = io.StringIO()
    config.train.steps = steps
    sink = ConsoleSink(config, output, terminal=terminal)
    sink.console.width = 140
    sink.start({"step": first, "steps": steps, "tokens": 1000 * first, "segment": 1, "origin": "new"})
    for step in range(first + 1, steps + 1):
        loss = math.nan if step == bad_step else 8 - step / 10
        if step == bad_step:
            sink.event("skipped_step", {"step": step, "in_a_row": 1, "loss": loss, "grad_norm": math.inf})
        times = {"time/data": 0.01, "time/forward_backward": 0.07, "time/optimizer": 0.02, "time/step": 0.1}
        sink.write({"step": step, "tokens": 1000 * step, "loss": loss, "tokens_per_second": 10_000.0, **times})
    sink.event("validation", {"step": steps, "loss": 4.25, "bits_per_byte": 1.5, "seconds": 0.5})
    sink.close({"status": "finished", "step": steps, "tokens": 1000 * steps})
    return output.getvalue()


def lines_of_steps(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("step ") and "/" in line.split()[1]]


def test_a_file_gets_a_line_every_console_every_steps_and_one_at_the_end():
    config = Config()
    config.logging.console_every = 15
    lines = lines_of_steps(run(config, terminal=False))
    assert [line.split()[1] for line in lines] == ["15/40", "30/40", "40/40"]
    assert lines[0] == "step 15/40  loss 6.5000  15,000 tokens  10,000 tokens/s  left 0:00:02"


def test_a_file_gets_no_control_characters():
    assert "\x1b" not in run(Config(), terminal=False)


def test_a_terminal_gets_a_bar_and_no_lines_of_steps():
    text = run(Config(), terminal=True)
    assert "\x1b" in text
    assert "40/40" in text
    assert "10,000 tokens/s" in text
    assert lines_of_steps(text) == []


def test_without_progress_a_terminal_gets_lines():
    config = Config()
    config.logging.progress = False
    assert len(lines_of_steps(run(config, terminal=True))) == 4


def test_validations_skipped_steps_and_the_end_are_said():
    text = run(Config(), terminal=False, bad_step=7)
    assert "step 7 skipped, 1 bad in a row: loss nan, gradient norm inf; weights unchanged" in text
    assert "step 40: validation loss 4.2500, 1.5000 bits a byte" in text
    assert "finished at step 40: 40 steps and 40,000 tokens in 0:00:" in text


def test_a_resumed_run_counts_its_own_steps():
    assert "finished at step 40: 15 steps and 15,000 tokens" in run(Config(), terminal=False, first=25)


def test_names_are_not_markup():
    config = Config()
    config.run.name = "[red]mine[/]"
    assert "run [red]mine[/]: model" in run(config, terminal=False)


def test_a_segment_without_a_step_ends_in_order():
    assert "finished at step 40: 0 steps and 0 tokens" in run(Config(), terminal=False, first=40)


WITHOUT_A_READER = """
import sys
from pathlib import Path
from kan_train.accounting.sinks.console import ConsoleSink
from kan_train.config import Config

config = Config()
config.logging.console_every = 1
sink = ConsoleSink(config, terminal=sys.argv[2] == "terminal")
sink.start({"step": 0, "steps": 2000, "tokens": 0, "origin": "new"})
for step in range(1, 2001):
    sink.write({"step": step, "tokens": step, "loss": 1.0, "tokens_per_second": 1.0, "time/step": 1.0})
sink.close({"status": "finished", "step": 2000, "tokens": 2000})
print("printed by somebody else", flush=True)
Path(sys.argv[1]).write_text("all steps done")
"""


@pytest.mark.parametrize("kind", ["terminal", "file"])
def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path: Path, kind: str):
    """`kan train | head -n 1`, or a terminal that is closed."""
    command = [sys.executable, "-c", WITHOUT_A_READER, str(tmp_path / "done"), kind]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.wait(timeout=60) == 0, writer.stderr.read()
    assert (tmp_path / "done").read_text() == "all steps done"
    assert writer.stderr.read() == ""


def test_a_device_that_fails_does_not_end_the_run():
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    config = Config()
    config.logging.console_every = 1
    sink = ConsoleSink(config, Gone(), terminal=False)
    sink.start({"step": 0, "steps": 2, "tokens": 0, "origin": "new"})
    sink.write({"step": 1, "tokens": 1, "loss": 1.0, "tokens_per_second": 1.0, "time/step": 1.0})
    sink.close({"status": "finished", "step": 1, "tokens": 1})
    assert sink.console.quiet
