"""The rendered script: shellcheck finds nothing in it, and bash runs what it should, with commands of Slurm's that write down how they are called.

Whether a real Slurm runs it is the matter of tests/slurm.
"""

import json
import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from kan_train.config import ConfigError
from kan_train.config.compose import compose_train
from kan_train.launch import slurm
from kan_train.launch.spec import spec_file, spec_for

ODD = "a b'\"$HOME `touch pwned` $(touch pwned) \\n %j;#&|*~!\nc"
BASE = ("cluster=slurm", "cluster.nodes=2", "run.device=cpu", "train.micro_batch_size=1")
SETTINGS = {
    "plain": (),
    "gpus": ("run.device=auto", "cluster.devices_per_node=4", "cluster.device_type=h100"),
    "h100": ("cluster=h100_slurm", "train.global_batch_size=16"),
    "everything": (
        "cluster.partition=train", "cluster.account=a", "cluster.qos=high", "cluster.time=24:00:00", "cluster.constraint=ib&h100", "cluster.reservation=r",
        "cluster.exclude=[n3,n4]", "cluster.memory=500G", "cluster.cpus_per_task=8", "+cluster.sbatch.exclusive=", "+cluster.sbatch.mail-type=FAIL",
        "cluster.modules=[cuda/12.8]", "cluster.setup=['umask 027','ulimit -l unlimited']", "cluster.scratch=/scratch dir",
        "cluster.network.interface=ib0", "cluster.network.hca=mlx5_0", "+cluster.network.environment.NCCL_DEBUG=WARN", f"+cluster.environment.ODD={ODD}",
    ),
    "pyxis": ("cluster.container.runtime=pyxis", "cluster.container.image=/images/kan train.sqsh", "cluster.container.mounts=['/data:/data']"),
    "apptainer": ("cluster.container.runtime=apptainer", "cluster.container.image=/images/kan.sif", "cluster.container.mounts=['/data:/data']"),
    "odd names": (f"run.name={ODD.replace(chr(92), '')}",),
}  # fmt: skip


def rendered(*overrides: str) -> tuple[str, object]:
    words = [*BASE, *overrides]
    config = compose_train(words, [], lambda config: config.cluster.world_size)
    spec = spec_for(config, words)
    return slurm.render(config, spec), spec


@pytest.mark.parametrize("name", SETTINGS)
def test_shellcheck_finds_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, _ = rendered(*SETTINGS[name])
    done = subprocess.run(["shellcheck", "-"], input=script, text=True, capture_output=True, check=False)
    assert done.stdout == ""
    assert done.returncode == 0


def test_every_setting_reaches_slurm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = rendered(*SETTINGS["everything"])[0].splitlines()
    options = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    wanted = {
        "nodes=2", "ntasks-per-node=1", "partition=train", "account=a", "qos=high", "time=24:00:00", "constraint=ib&h100", "reservation=r", "exclude=n3,n4",
        "mem=500G", "cpus-per-task=8", "exclusive", "mail-type=FAIL", "open-mode=append", "requeue", "dependency=singleton", "signal=B:USR1@180",
    }  # fmt: skip
    assert wanted <= options
    assert "umask 027" in lines
    assert "export TMPDIR='/scratch dir'" in lines


def test_gpus_are_asked_for_unless_the_run_is_on_cpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "--gpus-per-node=h100:4" in rendered(*SETTINGS["gpus"])[0]
    assert "--gpus" not in rendered()[0]


def test_slurm_reads_the_output_of_a_folder_with_odd_characters_as_that_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = [line for line in rendered("run.name=a \"b\" $c %j")[0].splitlines() if "--output" in line]
    assert line == f'#SBATCH --output="{tmp_path}/runs/a \\"b\\" $c %%j/logs/%j.out"'


def test_a_newline_goes_to_sbatch_by_its_command_line_and_a_backslash_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, spec = rendered("run.name=a\nb")
    assert "#SBATCH --output" not in script
    assert slurm.sbatch_options(spec) == [f"--output={tmp_path}/runs/a\nb/logs/%j.out"]
    with pytest.raises(ConfigError, match="backslash"):
        rendered("run.name=a\\b")


def test_jobs_of_one_run_share_a_name_that_no_other_run_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {slurm.job_name(rendered(f"run.name={name}")[1]) for name in ("first", "a b", "a_b", "a\nb")}
    assert len(names) == 4
    assert slurm.job_name(rendered("run.name=first")[1]) == slurm.job_name(rendered("run.name=first", "train.steps=70")[1])


def test_a_template_of_ones_own_is_used_and_quotes_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.j2").write_text("cd {{ working_directory }}\necho {{ cluster.scratch }}\n")
    assert rendered("cluster.template=own.j2", "cluster.scratch=$(touch pwned)")[0] == f"cd {tmp_path}\necho '$(touch pwned)'\n"


@pytest.mark.parametrize("text", ["{{ no_such_value }}", "{% if %}", "{{ cluster.no_such_setting }}"])
def test_a_template_with_a_mistake_is_refused_by_name(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.j2").write_text(text)
    with pytest.raises(ConfigError, match=r"cluster\.template=own\.j2"):
        rendered("cluster.template=own.j2")


# --- run by bash ----------------------------------------------------------------------------------------------------------------------------------------

STUBS = {
    "srun": 'while [[ $1 = --* ]]; do shift; done; exec "$@"',
    "scontrol": 'case "$1 $2" in "show hostnames") printf "n0\\nn1\\n" ;; '
    '"show job") echo "JobId=7 JobState=RUNNING SubmitTime=990 StartTime=1000 EndTime=Unknown" ;; *) echo "scontrol $*" >>calls ;; esac',
    "sleep": ":",
    "sbatch": 'printf "%s\\0" "$@" >sbatch.words; echo "8;cluster"',
    "python": 'printf "%s\\0" "$@" >>words; printf "\\n" >>words; printf "%s" "${ODD-}" >odd; case "$*" in *supervise\\ before*) exit "${BEFORE:-0}" ;; '
    '*supervise\\ after*) echo "${AFTER:-finished}" ;; *launch.node*) eval "${TRAIN:-true}" ;; esac',
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the script of some settings; returns the process and the calls of python, each a list of words."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in STUBS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.chdir(tmp_path)

    def start(*overrides: str, **environment: str) -> subprocess.Popen:
        script, spec = rendered(f"cluster.python={folder}/python", *overrides)
        Path("job.sbatch").write_text(script)
        given = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-1]", "HOME": "/root"}
        process = subprocess.Popen(["bash", "job.sbatch"], env=given | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        process.spec = spec  # type: ignore[attr-defined]
        return process

    return start


def calls() -> list[list[str]]:
    return [line.split("\0")[:-1] for line in Path("words").read_text().split("\0\n")[:-1] if line] if Path("words").exists() else []


def spoken() -> list[str]:
    """What python was asked, in short."""
    text = Path("words").read_text().replace("\0", " ")
    return [word for word in text.split() if word in ("before", "after", "resubmitted", "kan_train.launch.node")]


def test_names_with_quotes_dollars_and_newlines_arrive_unchanged_and_run_nothing(run, tmp_path):
    name = ODD.replace("\\", "")
    process = run(f"run.name={name}", f"+cluster.environment.ODD={ODD}")
    assert process.wait(30) == 0, process.stdout.read()
    words = Path("words").read_text().split("\0")
    assert str(spec_file(tmp_path / "runs" / name, 1)) in words
    assert Path("odd").read_text() == ODD
    assert not list(tmp_path.rglob("pwned"))


def test_a_finished_run_asks_before_trains_and_asks_after(run):
    assert run().wait(30) == 0
    assert spoken() == ["before", "kan_train.launch.node", "after"]


def test_the_start_is_told_when_it_was_given_its_nodes(run):
    assert run().wait(30) == 0
    (words,) = [words for words in calls() if "before" in words]
    assert words[words.index("--allocated") + 1] == "1000"
    assert words[words.index("--queued") + 1] == "990"


@pytest.mark.parametrize(("before", "status"), [("10", 0), ("1", 1), ("2", 2)])
def test_where_there_is_nothing_to_start_nothing_is_started(before, status, run):
    assert run(BEFORE=before).wait(30) == status
    assert spoken() == ["before"]


def test_a_requeue_asks_slurm_for_it(run):
    run(AFTER="requeue").wait(30)
    assert Path("calls").read_text() == "scontrol requeue 7\n"


def test_a_resubmission_leaves_the_bad_nodes_out_and_is_recorded(run):
    process = run(AFTER="resubmit n1,n3")
    assert process.wait(30) == 0, process.stdout.read()
    words = Path("sbatch.words").read_text().split("\0")
    assert "--exclude=n1,n3" in words
    assert words[-2].endswith("job-001.sbatch")
    assert spoken()[-1] == "resubmitted"
    assert "--new-job-id\x008\x00--exclude\x00n1,n3" in Path("words").read_text()


@pytest.mark.parametrize(("answer", "status"), [("give_up 3", 3), ("leave 75", 75), ("", 1)])
def test_giving_up_ends_the_job_with_the_trainers_status(answer, status, run):
    process = run(AFTER=answer or "none")
    assert process.wait(30) == status
    assert not Path("calls").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_reaches_the_trainers_as_usr1_and_the_script_waits_for_their_end(number, run):
    """srun answers SIGTERM by killing its tasks. The trainers take a while to save: their own status must arrive, not that of the interrupted wait."""
    process = run(TRAIN="trap 'touch saved; kill $child; command sleep 1; exit 75' USR1; touch ready; /bin/sleep 20 & child=$!; wait")
    deadline = time.monotonic() + 20
    while not Path("ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(30)
    assert Path("saved").exists()
    told = {"SIGUSR1": "USR1", "SIGTERM": "TERM"}[number.name]
    assert f"--status\x0075\x00--told\x00{told}\x00--state\x00RUNNING" in Path("words").read_text()


def test_the_description_keeps_every_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*BASE, f"run.name={ODD.replace(chr(92), '')}", f"+cluster.environment.ODD={ODD}"]
    from kan_train.launch.spec import read_spec, write_spec

    spec = spec_for(compose_train(words, [], lambda config: config.cluster.world_size), words)
    path = write_spec(spec)
    assert read_spec(path) == spec
    assert json.loads(path.read_text())["overrides"] == words
    assert spec.train_command()[-len(words) - 1 :] == ["--", *words]
