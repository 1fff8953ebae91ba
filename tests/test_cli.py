"""`kan`: help that teaches, settings in any place, and wrong ones refused with status 2 and one line before any work."""

import subprocess
import sys
from pathlib import Path

import pytest

from kan_train import __version__
from kan_train.cli import main
from kan_train.config import GenerateConfig
from kan_train.config.compose import compose_train, from_yaml

COMMANDS = [["train"], ["data", "prepare"], ["data", "inspect"], ["generate"]]


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "kan_train", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_teaches_with_examples(command: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as leaving:
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert leaving.value.code == 0
    assert f"\n  kan {' '.join(command)}" in text, "an example that can be copied"


def test_kan_alone_lists_its_commands(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    text = capsys.readouterr().out
    for command in ("train", "data", "generate"):
        assert f"    {command} " in text
    assert main(["data"]) == 2
    assert "inspect" in capsys.readouterr().out


def test_the_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert (leaving.value.code, capsys.readouterr().out.strip()) == (0, f"kan-train {__version__}")


def test_cfg_prints_the_effective_configuration(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--cfg", "job", "model=kan_125m", "run.name=x"]) == 0
    printed = capsys.readouterr().out
    assert from_yaml(printed) == compose_train(["model=kan_125m", "run.name=x"])
    assert "${" not in printed, "every value is filled in"


def test_settings_may_stand_on_both_sides_of_an_option(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "train.steps=40", "--cfg", "job", "run.name=x", "train.steps=50"]) == 0
    config = from_yaml(capsys.readouterr().out)
    assert (config.train.steps, config.run.name) == (50, "x")


def test_prepare_prints_its_configuration_too(capsys: pytest.CaptureFixture[str]):
    assert main(["data", "prepare", "--cfg", "job", "corpus=directory", "corpus.path=my texts"]) == 0
    assert "path: my texts\n" in capsys.readouterr().out


def test_settings_are_explained(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--settings"]) == 0
    text = capsys.readouterr().out
    assert "  train.steps = 300    [a whole number]\n      Optimizer steps of the run.\n" in text
    assert "  parallel=zero2\n" in text


def test_a_folder_of_ones_own_configurations(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("name: mine\nwidth: 64\n")
    assert main(["train", "--config-dir", str(tmp_path), "--cfg", "job", "model=mine"]) == 0
    assert from_yaml(capsys.readouterr().out).model.width == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "model=kan_tin"], "kan: model=kan_tin is not known; did you mean model=kan_tiny?"),
        (["train", "train.stepz=3"], "kan: train.stepz is not a setting; did you mean train.steps=3?"),
        (["train", "train.steps=few"], "kan: train.steps=few must be a whole number; use train.steps=300"),
        (["train", "model.grove.active_groves=99"], "kan: model.grove.active_groves=99 must lie between 1 and"),
        (["train", "--config-dir", "nowhere"], "kan: --config-dir nowhere is not a folder"),
        (["data", "prepare", "corpus=directory"], "kan: corpus=directory needs the folder with your files"),
        (["generate", "prompt=def main():"], "kan: run must be given; use run=NAME"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_one_line_and_status_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


UNKNOWN = [["train", "--confg", "job"], ["train", "--cfg", "all"], ["data", "inspect", "a", "b"], ["trane"]]


@pytest.mark.parametrize("arguments", UNKNOWN, ids=" ".join)
def test_an_unknown_option_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert "usage: kan" in capsys.readouterr().err


def test_code_reaches_generate_as_it_is_typed(monkeypatch: pytest.MonkeyPatch):
    import kan_train.config.compose as compose

    seen: list[GenerateConfig] = []

    class Reached(Exception):
        pass

    def stop_there(schema, overrides, config_dirs):  # type: ignore[no-untyped-def]
        seen.append(composed(schema, overrides, config_dirs))
        raise Reached

    composed = compose.compose_settings
    monkeypatch.setattr(compose, "compose_settings", stop_there)
    with pytest.raises(Reached):
        main(["generate", "run=kan_tiny", "prompt=def main(): # it's {1, 2}"])
    assert seen[0].prompt == "def main(): # it's {1, 2}"


def test_it_is_a_program_outside_the_clone(tmp_path: Path):
    """A wrong setting leaves nothing behind, and no traceback."""
    refused = run("train", "model=kan_tin", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "Traceback" not in refused.stderr
    assert list(tmp_path.iterdir()) == []
    assert run("train", "--cfg", "job", cwd=tmp_path).stdout.startswith("model:\n  name: kan_tiny\n")


def test_a_closed_pipe_is_no_error(tmp_path: Path):
    command = f"{sys.executable} -m kan_train train --settings | head -n 1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.stderr == ""
