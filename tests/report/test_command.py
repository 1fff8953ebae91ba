"""`kan cost report` and `watch` as a user calls them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kan_train.cli import main


def kan(*words: str | Path) -> int:
    return main(["cost", *map(str, words)])


@pytest.fixture
def root(runs: Path, tmp_path: Path) -> Path:
    """A folder of runs to be changed."""
    for name in ("first", "second"):
        shutil.copytree(runs / "first", tmp_path / "runs" / name, ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "runs"


@pytest.mark.parametrize("command", ["report", "watch", "sync"])
def test_help_teaches_with_examples(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as leaving:
        kan(command, "--help")
    text = capsys.readouterr().out
    assert leaving.value.code == 0
    assert len(re.findall(rf"\n  kan cost {command} first", text)) >= 3
    assert max(map(len, text.splitlines())) <= 160


def test_nothing_is_loaded_before_a_command_runs():
    code = "import sys; from kan_train.cli import main; main(['cost']); assert not {'torch', 'numpy', 'jinja2', 'rich', 'plotly', 'wandb'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_page_needs_neither_torch_nor_a_device(root: Path):
    code = f"import sys; from kan_train.cli import main; main(['cost', 'report', {str(root / 'first')!r}]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_page_lies_in_the_run_or_where_it_is_asked_for(root: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]):
    assert kan("report", "first", "--root", root) == 0
    said = capsysbinary.readouterr().out.decode()
    assert re.fullmatch(rf"{re.escape(str(root / 'first' / 'report.html'))} \(\d\.\d MB\): open it in a browser\n", said)
    page = (root / "first" / "report.html").read_text()
    assert kan("report", "first", "second", "--root", root) == 0
    assert "Side by side" in (root / "report.html").read_text()
    assert kan("report", root / "first", "-o", tmp_path / "new" / "page.html", "--price", "2") == 0
    assert "source: --price=2" in (tmp_path / "new" / "page.html").read_text()
    capsysbinary.readouterr()
    assert kan("report", "first", "--root", root, "-o", "-") == 0
    written = capsysbinary.readouterr().out.decode()
    made = re.compile(r"at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC")
    assert made.sub("", written) == made.sub("", page)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("report", "nope"), r"kan: 'nope' is not a run with a ledger.jsonl; .* \(first, second\)"),
        (("report", "first", "--price", "spot"), r"kan: --price=spot: there is no price of 'cpu' in spot; give a number"),
        (("report", "first", "-o", "FOLDER"), r"kan: -o .* is a folder; use -o .*report\.html"),
        (("watch", "first", "--once", "--every", "0"), r"kan: --every 0 must be between 0\.1 and 86400 seconds; use --every 10"),
        (("watch", "first", "--once", "--price", "-1"), r"kan: --price=-1 must be a positive number"),
    ],
)
def test_what_makes_no_sense_is_refused(words: tuple[str, ...], message: str, root: Path, capsys: pytest.CaptureFixture[str]):
    assert kan(*(str(root) if word == "FOLDER" else word for word in words), "--root", root) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_that_is_no_run_does_not_hide_one_of_its_name(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("first").mkdir()
    Path("later").mkdir()
    assert kan("watch", "first", "--once") == 0
    assert "finished" in capsys.readouterr().out
    assert kan("watch", "later", "--once") == 0
    assert "waiting for runs/later" in capsys.readouterr().out
    Path("later", "config.yaml").touch()
    assert kan("watch", "later", "--once") == 0
    assert "waiting for later" in capsys.readouterr().out, "a run that has not begun"


def test_watch_shows_what_there_is_now(root: Path, capsys: pytest.CaptureFixture[str]):
    assert kan("watch", "first", "--once", "--root", root) == 0
    assert "finished" in capsys.readouterr().out
    assert kan("watch", "later", "--once", "--root", root) == 0
    assert "waiting for" in capsys.readouterr().out
