"""`kan launch cancel | resume | chain`, and sweeps as array jobs: what is asked of Slurm, and what is recorded. The stubs train nothing."""

import subprocess
from pathlib import Path

import pytest

from kan_train.cli import main
from kan_train.launch.attempts import attempts_of, read_events, record
from kan_train.launch.jobs import merged
from kan_train.launch.spec import jobs_of, read_spec, spec_file
from kan_train.launch.supervise import EXIT_DONE, after, before

SETTINGS = ("cluster=slurm", "cluster.nodes=2", "run.device=cpu", "run.name=first", "train.steps=50")


@pytest.fixture
def folder(tmp_path, monkeypatch, slurm_stub) -> Path:
    """A working directory, where Slurm's commands are stubs and what is checked before a submission is not looked at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kan_train.commands.launch.check_job", lambda *_: [])
    return tmp_path


def kinds(run: Path) -> list[str]:
    return [event["event"] for event in read_events(run)]


def event(run: Path, kind: str, job_id: str, job: int = 1, **fields: object) -> None:
    record(run, kind, job=job, scheduler="slurm", job_id=job_id, **fields)


def started(run: Path, job_id: str, job: int = 1) -> None:
    event(run, "started", job_id, job, hosts=["n0", "n1"], step=0)


def saved(run: Path, step: int) -> None:
    target = run / "checkpoints" / f"step-{step:08d}"
    target.mkdir(parents=True)
    (target / "manifest.json").write_text("{}")


@pytest.fixture
def run(folder) -> Path:
    """A run with a submitted job, 101."""
    assert main(["launch", "slurm", *SETTINGS]) == 0
    return folder / "runs" / "first"


# --- cancel -----------------------------------------------------------------------------------------------------------------------------------------------


def test_a_running_job_is_told_to_save_and_the_step_is_said(run, slurm_stub, capsys):
    started(run, "101")
    saved(run, 40)
    slurm_stub.queue(job101="RUNNING")
    assert main(["launch", "cancel", "first"]) == 0
    assert slurm_stub.calls("scancel") == ["--batch --signal=USR1 101"]
    assert "job 101: cancelled; the run is saved at step 40, and `kan launch resume runs/first` goes on with it" in capsys.readouterr().out
    assert kinds(run) == ["submitted", "started", "cancelled", "ended"]


def test_with_now_it_is_killed(run, slurm_stub):
    started(run, "101")
    slurm_stub.queue(job101="RUNNING")
    assert main(["launch", "cancel", "first", "--now"]) == 0
    assert slurm_stub.calls("scancel") == ["101"]
    assert attempts_of(read_events(run))[0].cause == "cancelled"


def test_a_waiting_job_goes_before_the_running_one_that_it_would_follow(run, slurm_stub):
    started(run, "101")
    event(run, "submitted", "102", 2, nodes=2, processes_per_node=1)
    slurm_stub.queue(job101="RUNNING", job102="PENDING Dependency")
    assert main(["launch", "cancel", "first", "--no-wait"]) == 0
    assert slurm_stub.calls("scancel") == ["102", "--batch --signal=USR1 101"]


def test_where_nothing_runs_there_is_nothing_to_cancel(run, slurm_stub, capsys):
    assert main(["launch", "cancel", "first"]) == 0
    assert "no job of runs/first waits or runs; nothing of the run is saved" in capsys.readouterr().out
    assert kinds(run) == ["submitted"]


def test_a_cancelled_job_is_not_put_back_into_the_queue(run):
    """Neither when its attempt ends saved, as ahead of its time limit, nor where Slurm starts it once more."""
    spec = read_spec(spec_file(run, 1))
    assert before(spec, "101", 0, ["n0", "n1"]) == 0
    event(run, "cancelled", "101", reason="by its user")
    decision = after(spec, "101", 0, ["n0", "n1"], 75, "USR1", "RUNNING")
    assert decision.action == "leave"
    assert kinds(run)[-1] == "ended"
    assert before(spec, "101", 1, ["n0", "n1"]) == EXIT_DONE
    assert before(spec, "102", 0, ["n0", "n1"]) == 0  # another job of the run may


# --- resume and chain ---------------------------------------------------------------------------------------------------------------------------------------


def test_resume_submits_the_same_again_with_further_settings(run, slurm_stub):
    assert main(["launch", "resume", "first", "train.steps=90", "run.seed=4"]) == 0
    assert jobs_of(run) == [1, 2]
    old, new = read_spec(spec_file(run, 1)), read_spec(spec_file(run, 2))
    assert new.overrides == [*SETTINGS[:-1], "train.steps=90", "run.seed=4"]
    assert (new.steps, new.run_dir, new.working_directory, new.nodes) == (90, old.run_dir, old.working_directory, 2)
    assert slurm_stub.calls("sbatch")[-1].endswith(f"-- {run}/launch/job-002.sbatch")


def test_resume_works_from_any_folder(run, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert main(["launch", "resume", str(run)]) == 0
    assert read_spec(spec_file(run, 2)).run_dir == str(run)


@pytest.mark.parametrize("state", ["RUNNING", "PENDING Priority", "COMPLETING"])
def test_resume_is_refused_while_a_job_is_left(run, slurm_stub, capsys, state):
    started(run, "101")
    slurm_stub.queue(job101=state)
    assert main(["launch", "resume", "first"]) == 2
    assert "wait for its end, or end it with `kan launch cancel" in capsys.readouterr().err
    assert len(slurm_stub.calls("sbatch")) == 1


@pytest.mark.parametrize("override", ["run.name=other", "run.root=elsewhere"])
def test_resume_makes_no_other_run(run, capsys, override):
    assert main(["launch", "resume", "first", override]) == 2
    assert f"{override} would make another run" in capsys.readouterr().err


def test_further_settings_take_the_place_of_the_old_ones():
    old = ["model=kan_tiny", "train.steps=5", "+data.blend.a=1.0", "~data.blend.b"]
    assert merged(old, ["model=kan_1b", "data.blend.a=2.0"]) == ["train.steps=5", "~data.blend.b", "model=kan_1b", "data.blend.a=2.0"]


def test_a_chain_is_jobs_that_wait_for_each_other(run, slurm_stub):
    assert main(["launch", "chain", "--jobs", "3", "first", "train.steps=90"]) == 0
    assert jobs_of(run) == [1, 2, 3, 4]
    assert [read_spec(spec_file(run, job)).steps for job in jobs_of(run)] == [50, 90, 90, 90]
    first, second, third = slurm_stub.calls("sbatch")[1:]
    assert "--dependency" not in first  # the script has its own
    assert "--dependency=afterany:102,singleton" in second
    assert "--dependency=afterany:103,singleton" in third
    assert f"spec={run}/launch/job-004.json" in (run / "launch" / "job-004.sbatch").read_text()


def test_a_chain_from_the_beginning(folder, slurm_stub):
    assert main(["launch", "chain", "--jobs", "2", *SETTINGS]) == 0
    assert len(slurm_stub.calls("sbatch")) == 2
    assert kinds(folder / "runs" / "first") == ["submitted", "submitted"]


def test_a_job_that_finds_the_run_finished_ends_at_once(run):
    spec = read_spec(spec_file(run, 1))
    event(run, "finished", "101", steps=50)
    assert before(spec, "102", 0, ["n0", "n1"]) == EXIT_DONE


# --- sweeps -------------------------------------------------------------------------------------------------------------------------------------------------


def test_a_sweep_is_one_array_job(folder, slurm_stub, capsys):
    values = ("optimizer.learning_rate=1e-3,3e-4", "run.seed=1,2")
    assert main(["launch", "slurm", "--multirun", "--max-at-once", "3", *SETTINGS, *values]) == 0
    names = [f"first-learning_rate_{rate}-seed_{seed}" for rate in ("0.001", "0.0003") for seed in (1, 2)]
    assert sorted(path.name for path in (folder / "runs").iterdir()) == sorted(names)
    (call,) = slurm_stub.calls("sbatch")
    assert call.endswith(f"-- {folder}/runs/{names[0]}/launch/job-001.sbatch")
    for number, name in enumerate(names):
        run = folder / "runs" / name
        (submitted,) = read_events(run)
        assert submitted["job_id"] == f"101_{number}"
        assert f"run.name='{name}'" in read_spec(spec_file(run, 1)).overrides
        assert f"  {number}: {run}" in capsys.readouterr().out or number
    script = (folder / "runs" / names[0] / "launch" / "job-001.sbatch").read_text()
    assert "#SBATCH --array=0-3%3" in script
    assert "singleton" not in script  # all tasks of an array have one name: they would run one by one


def test_the_tasks_of_an_array_have_their_own_description_and_output(folder, slurm_stub):
    """The script's own words, run as far as they choose the task."""
    assert main(["launch", "slurm", "--multirun", "cluster=slurm", "run.device=cpu", "run.name=it's $odd", "run.seed=1,2"]) == 0
    (script,) = (folder / "runs").glob("*/launch/*.sbatch")
    lines = script.read_text().splitlines()
    first, last = (next(number for number, line in enumerate(lines) if line.startswith(word)) for word in ("tasks=", "exec >>"))
    chosen = "\n".join([*lines[first : last + 1], 'printf "%s\\n" "$spec" "$job"'])
    subprocess.run(["bash", "-uc", chosen], env={"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}, check=True)
    run = folder / "runs" / "it_s $odd-seed_2"
    assert (run / "logs" / "7_1.out").read_text().splitlines() == [f"{run}/launch/job-001.json", "7_1"]


def test_the_script_of_an_array_passes_shellcheck(folder, capsys):
    assert main(["launch", "slurm", "--multirun", "--dry-run", *SETTINGS, "run.seed=1,2", "data.root='a b; $(x)'"]) == 0
    output = capsys.readouterr()
    (folder / "script").write_text(output.out)
    checked = subprocess.run(["shellcheck", str(folder / "script")], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert "first-seed_2" in output.err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--multirun", *SETTINGS], "no setting has several values"),
        (["--multirun", *SETTINGS, "cluster.partition=a,b"], "whose runs all have the same machines"),
        (["--multirun", *SETTINGS, "optimizer.learning_rate=1,-1"], "optimizer.learning_rate=-1 is not possible"),
        (["--multirun", "run.device=cpu", "run.seed=1,2"], "use cluster=slurm"),
        ([*SETTINGS, "run.seed=1,2"], "gives several values, but this is one run"),
    ],
)
def test_sweeps_that_are_refused(folder, slurm_stub, capsys, more, says):
    assert main(["launch", "slurm", *more]) == 2
    assert says in capsys.readouterr().err
    assert slurm_stub.calls("sbatch") == []
    assert not (folder / "runs").exists()
