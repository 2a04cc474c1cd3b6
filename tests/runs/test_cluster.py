"""Jobs share a run: submitit's own processes stand in for a cluster, and a script for sbatch."""

from __future__ import annotations

import builtins
import os
import pickle
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import submitit
from submitit.core.utils import DelayedSubmission

from depthprobe.errors import BadInput
from depthprobe.files import write_json
from depthprobe.runs import cluster
from depthprobe.runs.cluster import JOBS, SharedSweep, array_id, follow, last_line, submit
from depthprobe.runs.processes import Progress
from depthprobe.runs.records import RECORD, Record, read_record
from depthprobe.runs.store import open_run
from depthprobe.study import Recipe, Slurm, Study, Tracking, study_to_toml

LOCAL = Slurm(minutes=30, gpus=0)


@pytest.fixture
def sweep(tiny: Study, tmp_path: Path) -> SharedSweep:
    study = replace(tiny, slurm=LOCAL)
    return SharedSweep(study=study, folder=str(tmp_path / "run"), command="typed")


@pytest.fixture
def running() -> Iterator[list[submitit.Job[None]]]:
    """Jobs that end with the test, whatever becomes of it."""
    jobs: list[submitit.Job[None]] = []
    yield jobs
    for job in jobs:
        if not job.done():
            job.cancel()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The commands of a cluster whose scheduler takes every job and never begins one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {
        "srun": "exit 1",
        "sbatch": f'cp "$1" {folder}/submitted; env > {folder}/environment;'
        " echo Submitted batch job 31",
        "sacct": "echo 'JobID|State|NodeList'; echo '31_0|PENDING|'; echo '31_1|FAILED|node7'",
    }.items():
        script = folder / name
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def refuse(folder: Path, reason: str) -> None:
    (folder / "sbatch").write_text(f"#!/bin/sh\necho 'sbatch: error: {reason}' >&2; exit 1\n")


@pytest.mark.slow
def test_two_jobs_do_everything_once(
    sweep: SharedSweep, running: list[submitit.Job[None]], recorder: Any
) -> None:
    running += submit(sweep, jobs=2, cluster="local")
    assert follow(running, recorder, poll=0.2) == {}
    run = open_run(sweep.folder)
    assert sorted(run.trials["trial"]) == ["popularity-s0", "sasrec-s0"]
    assert set(run.trials["status"]) == {"done"}
    assert run.manifest.command == "typed"
    assert recorder.texts[0].startswith("jobs: ")
    assert recorder.texts[-1] == "jobs: 2 ended"
    assert not list(Path(sweep.folder, "checkpoints").glob("*"))


def test_a_job_that_fails_is_told_by_its_last_words(
    sweep: SharedSweep, running: list[submitit.Job[None]], tmp_path: Path
) -> None:
    data = replace(sweep.study.data, source=str(tmp_path / "nowhere.txt"))
    broken = replace(sweep, study=replace(sweep.study, data=data))
    running += submit(broken, cluster="local")
    failures = follow(running, Progress(), poll=0.2)
    assert list(failures) == [running[0].job_id]
    assert "nowhere.txt" in failures[running[0].job_id]
    assert "\n" not in failures[running[0].job_id]


@pytest.mark.slow
def test_a_job_that_is_pre_empted_goes_on(
    sweep: SharedSweep, running: list[submitit.Job[None]]
) -> None:
    long = Recipe(epochs=400, batch_size=16, patience=400)
    study = replace(sweep.study, methods=("sasrec",))
    study = replace(study, sasrec=replace(study.sasrec, recipe=long))
    running += submit(replace(sweep, study=study), cluster="local")
    (job,) = running
    lock = Path(sweep.folder, ".locks", "sasrec-s0.lock")
    deadline = time.monotonic() + 120
    while not lock.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    (process,) = psutil.Process(int(job.job_id)).children()
    process.send_signal(signal.SIGTERM)  # comes first on a cluster, and must do nothing
    process.send_signal(signal.SIGUSR2)
    assert follow(running, Progress(), poll=0.2) == {}
    log = (job.stdout() or "") + (job.stderr() or "")
    assert "Requeued job" in log
    assert log.count("Starting with") == 2
    record = read_record(Path(sweep.folder, "trials", "sasrec-s0"))
    assert record is not None
    assert record.training.epochs == 400


def test_what_is_queued_again_is_the_same(sweep: SharedSweep) -> None:
    again = sweep.checkpoint()
    assert isinstance(again, DelayedSubmission)
    assert pickle.loads(pickle.dumps(again)).function == sweep  # noqa: S301


def test_slurm_is_asked_for_what_the_study_says(
    sweep: SharedSweep, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Slurm(
        partition="gpu",
        account="lab",
        minutes=90,
        gpus=2,
        cpus=6,
        memory_gb=48,
        setup=("module load cuda", 'export HF_HOME="$SCRATCH/hub"'),
    )
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "100")
    monkeypatch.setenv("SBATCH_QOS", "high")
    monkeypatch.setenv("SLURM_CONF", "/cluster/slurm.conf")
    study = replace(sweep.study, slurm=settings)
    jobs = submit(replace(sweep, study=study), jobs=3)
    assert [job.job_id for job in jobs] == ["31_0", "31_1", "31_2"]
    assert array_id(jobs) == "31"
    lines = (slurm / "submitted").read_text().splitlines()
    asked = dict(re.findall(r"#SBATCH --([\w-]+)=(.*)", "\n".join(lines)))
    wanted = {
        "job-name": "small",
        "partition": "gpu",
        "account": "lab",
        "time": "90",
        "gpus-per-node": "2",
        "cpus-per-task": "6",
        "mem": "48GB",
        "array": "0-2%3",
        "signal": "USR2@90",
        "open-mode": "append",
    }
    assert {key: asked[key] for key in wanted} == wanted
    assert asked["output"].startswith(f"{sweep.folder}/{JOBS}/")
    assert lines.index(settings.setup[1]) == lines.index(settings.setup[0]) + 1
    environment = (slurm / "environment").read_text()
    assert "SBATCH_QOS=high" in environment
    assert "SLURM_CONF=/cluster/slurm.conf" in environment
    assert "SLURM_MEM_PER_CPU" not in environment
    assert os.environ["SLURM_MEM_PER_CPU"] == "100"
    # the jobs lay the run out: the folder has to pass for a new one until then
    assert [entry.name for entry in Path(sweep.folder).iterdir()] == [JOBS]
    assert submit(sweep)[0].job_id == "31"
    submission = jobs[0].submission()
    assert submission.function.study == study
    assert submission._timeout_countdown == cluster.REQUEUES


@pytest.mark.parametrize(
    "name", ["a\ntouch PWNED\n#", "a'; touch PWNED #", "$(touch PWNED)", "é\r\x1b"]
)
def test_a_name_becomes_no_command(sweep: SharedSweep, slurm: Path, name: str) -> None:
    submit(replace(sweep, study=replace(sweep.study, name=name)))
    script = (slurm / "submitted").read_text()
    assert not re.search("^ *touch", script, re.MULTILINE)
    (asked,) = re.findall("--job-name=(.*)", script)
    assert re.fullmatch(r"[\w.-]+", asked)
    assert "-P -u -m submitit" in script
    assert "PYTHONSAFEPATH=1" in (slurm / "environment").read_text()


def test_a_folder_or_setting_that_ends_a_line_is_refused(
    sweep: SharedSweep, slurm: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="output: .* a folder without line breaks"):
        submit(replace(sweep, folder=str(tmp_path / "a\ntouch PWNED")))
    for name in ("partition", "account"):
        with pytest.raises(BadInput, match=f"{name}: expected "):
            Slurm(**{name: "gpu\ntouch PWNED"})
    assert not (slurm / "submitted").exists()


def test_earlier_failures_are_forgotten_when_the_jobs_are_submitted(
    sweep: SharedSweep, slurm: Path
) -> None:
    record = Path(sweep.folder, "trials", "sasrec-s0", RECORD)
    failure = Record(id="sasrec-s0", method="sasrec", seed=0, status="failed")
    write_json(record, msgspec.to_builtins(failure))
    Path(sweep.folder, "study.toml").write_text(study_to_toml(sweep.study))
    submit(sweep)
    assert record.exists()
    submit(sweep, retry_failed=True)
    assert not record.exists()


def test_what_is_left_out_is_left_to_the_cluster(sweep: SharedSweep, slurm: Path) -> None:
    submit(sweep)
    text = (slurm / "submitted").read_text()
    for name in ("partition", "account", "gpus", "array", "qos"):
        assert f"#SBATCH --{name}" not in text


def test_jobs_are_followed_by_what_the_scheduler_says(
    sweep: SharedSweep, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submitit.SlurmJob, "_results_timeout_s", 0)
    cancelled = "#!/bin/sh\necho 'JobID|State|NodeList'; echo '31_[0-1]|CANCELLED|'\n"
    shown: list[str] = []

    class Cancelling(Progress):
        def message(self, text: str) -> None:
            shown.append(text)
            (slurm / "sacct").write_text(cancelled)

    submitted = submit(sweep, jobs=2)
    failures = follow(submitted, Cancelling(), poll=0.1)
    assert shown == ["jobs: 1 ended, 1 pending", "jobs: 2 ended"]
    assert sorted(failures) == ["31_0", "31_1"]


def test_what_slurm_refuses_is_one_line(sweep: SharedSweep, slurm: Path) -> None:
    refuse(slurm, "invalid partition specified: gpux")
    study = replace(sweep.study, slurm=Slurm(partition="gpux"))
    with pytest.raises(BadInput, match="slurm: .*invalid partition.*gpux") as caught:
        submit(replace(sweep, study=study))
    assert "\n" not in str(caught.value)


def test_without_slurm_nothing_is_written(sweep: SharedSweep, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no srun here"):
        submit(sweep)
    assert not Path(sweep.folder).exists()


def test_without_submitit(sweep: SharedSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("submitit"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(BadInput, match=r"pip install 'depthprobe\[slurm\]'"):
        submit(sweep)


def test_what_would_end_every_job_is_refused_before(
    sweep: SharedSweep, slurm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tracked = replace(sweep.study, tracking=Tracking(to=("tensorbord",)))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    for wrong, named in (
        (replace(sweep, study=tracked), "tensorboard"),
        (replace(sweep, folder=str(tmp_path / "taken")), "new or empty folder"),
    ):
        with pytest.raises(BadInput, match=named):
            submit(wrong)
    with pytest.raises(BadInput, match="jobs"):
        submit(sweep, jobs=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="accelerate launch"):
        submit(sweep)
    assert not (slurm / "submitted").exists()


def test_the_last_line_that_says_something() -> None:
    text = (
        "Job (task=0) failed during processing with trace:\n----------\nTraceback\nValueError: no"
    )
    assert last_line(
        f"{text}\n----------\nYou can check full logs with 'job'or at paths:\n  - a\n"
    ) == ("ValueError: no")
    assert last_line("") == "no reason given"
