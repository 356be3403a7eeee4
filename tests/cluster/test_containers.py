"""A plan's container in a job of a real Slurm, by real runtimes: podman of this machine, apptainer of Debian's sid."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from radeon_stack.errors import Exit, ImageError
from radeon_stack.images.convert import Conversion, conversion, converting, loading
from radeon_stack.images.published import Wanted
from radeon_stack.images.sites import SiteImage, site_image
from radeon_stack.launch.node_containers import words
from radeon_stack.launch.plan import LaunchPlan, Mount
from tests.cluster.site import Site, missing, open_site
from tests.conftest import wait_for
from tests.engine.debian import HERE, bootstrap, impossible
from tests.unit.test_node_containers import site_plan

NODES = ("n1", "n2")
SECRET = "tell-no-one"  # noqa: S105
WANTED = Wanted("train", "cpu")
ODD = 'a, b=$HOME "c" `id` %d'
PODMAN = ("podman", "crun", "newuidmap", "catatonit")
SID = (
    *("apptainer", "squashfuse", "fuse3", "uidmap", "catatonit", "iproute2", "python3-minimal", "procps"),
    *("slurmd", "slurmctld", "slurm-client", "munge"),
)


@pytest.fixture(scope="module", params=["podman", "apptainer"])
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def site(runtime: str) -> Iterator[Site]:
    if runtime == "podman":
        require(HERE, *PODMAN)
        with open_site(cgroups=True) as made:
            yield made
        return
    if why := impossible():
        pytest.skip(why)
    if not os.environ.get("RADEON_STACK_SID"):
        pytest.skip("apptainer comes with Debian's sid, a minute to fetch and two to try: RADEON_STACK_SID=1")
    # Not pytest's folder: another user has to walk this one.
    folder = Path(tempfile.mkdtemp(prefix="rs-sid-"))
    try:
        folder.chmod(0o755)
        bootstrap("sid", folder, *SID)
        require(folder, "apptainer")
        with open_site(folder, cgroups=True) as made:
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require(root: Path, *programs: str) -> None:
    if lacking := missing(root, *programs):
        pytest.skip(
            f"there is no {', '.join(lacking)} (Debian: apt-get install podman crun uidmap catatonit docker-registry "
            "busybox-static slurmd slurmctld munge)"
        )


@pytest.fixture
def image(site: Site) -> SiteImage:
    with site.network():
        return site_image(f"{site.repository}:train-cpu-stable", (), WANTED)


def made_in(site: Site, image: SiteImage, runtime: str, home: str = "shared", node: str = "n1") -> Conversion:
    """As for a node that has a disk of its own: both are on one machine here."""
    return conversion(image, runtime, site.home / home, str(site.disk(node)) if runtime == "podman" else "")


@pytest.fixture
def ready(site: Site, image: SiteImage, runtime: str) -> Conversion:
    """The site has its file, and the first node its image."""
    made = made_in(site, image, runtime)
    done = site.run(["srun", "--nodelist=n1", "sh", "-c", converting(made) + (loading(made) or "true")])
    assert done.returncode == 0, done.stderr
    return made


def plan_for(site: Site, runtime: str, tmp_path: Path, **fields: object) -> LaunchPlan:
    """A run's plan, with folders of the person's, and no devices: there are none here."""
    for name in ("in, put", "out"):
        site.write(f"{name}/file", "told\n")
    return site_plan(
        tmp_path,
        runtime,
        env=(("HOME", "/radeon-stack/out"), ("ODD", ODD), ("FROM_THE_IMAGE", "no")),
        mounts=(
            Mount(str(site.home / "in, put"), "/radeon-stack/in, put", read_only=True),
            Mount(str(site.home / "out"), "/radeon-stack/out", read_only=False),
        ),
        devices=("/dev/zero",),
        **fields,
    )


def step(plan: LaunchPlan, made: Conversion, command: list[str], *srun: str) -> str:
    """A line of a job's script: the command, in the plan's container, on the first node."""
    told = words(plan, made.name, storage=made.storage)
    return shlex.join(["srun", "--nodes=1", "--nodelist=n1", *srun, *told.srun, *told.before, *command])


def test_an_image_is_resolved_by_tag_digest_and_fit_without_an_engine(site: Site) -> None:
    with site.network():
        by_tag = site_image(f"{site.repository}:train-cpu-stable", (), WANTED)
        by_digest = site_image(site.reference, (), WANTED)
        by_fit = site_image(None, (site.repository,), WANTED)
        assert by_tag.reference == by_digest.reference == by_fit.reference == site.reference
        assert by_tag.image.torch == "2.13.0" and by_tag.plain and by_tag.download > 500_000
        assert "train, for a machine without a GPU" in by_fit.image.why
        with pytest.raises(ImageError, match="no such image"):
            site_image(f"{site.repository}:absent", (), WANTED)


def test_a_job_makes_the_image_once_and_each_node_runs_it(site: Site, image: SiteImage, runtime: str) -> None:
    """Two jobs, one of two nodes; the second has no need of a registry."""
    nodes = {node: made_in(site, image, runtime, "once", node) for node in NODES}
    plan = site_plan(site.folder, runtime, mounts=(), env=(), devices=())
    lines = [f"sh {site.write('convert.sh', converting(nodes['n1']))} || exit"]
    for node, made in nodes.items():
        load = site.write(f"load-{node}.sh", loading(made) or "true\n")
        told = words(plan, made.name, storage=made.storage)
        begin = ("srun", "--nodes=1", "--ntasks=1", f"--nodelist={node}")
        lines += [
            f"{shlex.join(begin)} sh {load} || exit",
            shlex.join(
                [*begin, *told.srun, *told.before, "sh", "-c", "echo on $SLURM_STEP_NODELIST by $FROM_THE_IMAGE"]
            ),
        ]
    job = site.submit("once", lines)
    assert site.ended(job) == "COMPLETED", site.output("once")
    assert [line for line in site.output("once").splitlines() if line.startswith("on ")] == [
        "on n1 by yes",
        "on n2 by yes",
    ]
    file = Path(nodes["n1"].file)
    before = file.stat()
    assert (site.home / "once" / "images").stat().st_mode & 0o077 == 0
    again = site.run(["sh", str(site.home / "convert.sh")], PATH="/usr/bin:/bin", http_proxy="http://127.0.0.1:1")
    assert again.returncode == 0 and again.stderr == ""
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_what_runs_inside_has_the_plans_mounts_and_variables_and_no_rights(
    site: Site, ready: Conversion, runtime: str, tmp_path: Path
) -> None:
    plan = plan_for(site, runtime, tmp_path)
    asked = [
        'cat "/radeon-stack/in, put/file"',
        'touch "/radeon-stack/in, put/new" 2>/dev/null || echo kept: input',
        "touch /radeon-stack/out/new && echo wrote: output",
        "touch /new 2>/dev/null || echo kept: root",
        "touch ${TMPDIR:-/tmp}/new && echo wrote: scratch",
        "head -c 4 /dev/zero | wc -c",
        'grep -E "^(Cap|NoNewPrivs)" /proc/self/status',
        "env",
        "echo at $PWD; df /dev/shm",
        f'test -e "{site.home}" || echo kept: home',
    ]
    job = site.submit(
        "inside",
        [step(plan, ready, ["sh", "-c", "\n".join(asked)])],
        HF_TOKEN=SECRET,
        PYTHONPATH="/leak",
        APPTAINER_BIND="/etc",
        ROCR_VISIBLE_DEVICES="1",
    )
    assert site.ended(job) == "COMPLETED", site.output("inside")
    told = site.output("inside").splitlines()
    for line in ("told", "kept: input", "wrote: output", "kept: root", "wrote: scratch", "4", "at /", "kept: home"):
        assert line in told, line
    assert (site.home / "out" / "new").stat().st_uid == 4321
    assert {line.split()[-1] for line in told if line.startswith("Cap")} == {"0" * 16}
    assert [line.split()[-1] for line in told if line.startswith("NoNewPrivs")] == ["1"]
    for line in (f"ODD={ODD}", "HOME=/radeon-stack/out", "FROM_THE_IMAGE=no", f"HF_TOKEN={SECRET}"):
        assert line in told, line
    assert "SLURM_PROCID=0" in told and f"SLURM_JOB_ID={job}" in told and "ROCR_VISIBLE_DEVICES=1" in told
    assert not [line for line in told if line.startswith(("PYTHONPATH=", "XDG_RUNTIME_DIR="))]
    assert SECRET not in step(plan, ready, [])


def test_an_exit_code_comes_out_as_it_is(site: Site, ready: Conversion, runtime: str, tmp_path: Path) -> None:
    job = site.submit("code", [step(plan_for(site, runtime, tmp_path), ready, ["sh", "-c", "exit 6"])])
    assert site.ended(job) == "FAILED"
    assert "ExitCode=6:0" in site.run(["scontrol", "show", "job", job]).stdout


def test_signals_reach_the_workload_which_ends_in_its_own_time(
    site: Site, ready: Conversion, runtime: str, tmp_path: Path
) -> None:
    """USR1 comes before a time limit, TERM at a preemption: both are for it to save what it has."""
    last = "USR1" if runtime == "podman" else "TERM"  # podman's monitor: see what is lost
    work = (
        f"trap 'echo got {last}; sleep 1; echo saved; exit 3' {last}; [ {last} = USR1 ] || trap 'echo got USR1' USR1; "
        "echo begun; while true; do sleep 0.2; done"
    )
    job = site.submit("signals", [step(plan_for(site, runtime, tmp_path), ready, ["sh", "-c", work])])
    wait_for(lambda: "begun" in site.output("signals"), seconds=30, what="the workload")
    for name in dict.fromkeys(("USR1", last)):
        site.run(["scancel", f"--signal={name}", job])
        wait_for(lambda name=name: f"got {name}" in site.output("signals"), seconds=15, what=name)  # type: ignore[misc]
    assert site.ended(job) == "FAILED", site.output("signals")
    assert "ExitCode=3:0" in site.run(["scontrol", "show", "job", job]).stdout
    assert "saved" in site.output("signals").splitlines()


def test_nothing_is_left_of_what_was_killed(site: Site, ready: Conversion, runtime: str, tmp_path: Path) -> None:
    mark = "sleep 98765"
    plan = replace(plan_for(site, runtime, tmp_path), run_id="killed")
    job = site.submit("killed", [step(plan, ready, ["sh", "-c", f"echo begun; {mark}"])])
    wait_for(lambda: "begun" in site.output("killed"), seconds=30, what="the workload")
    assert site.processes(mark)
    site.run(["scancel", "--signal=KILL", "--full", job])
    site.ended(job)
    wait_for(lambda: not site.processes(mark), seconds=15, what="its processes to go")
    wait_for(lambda: not site.processes("conmon"), seconds=15, what="podman's monitor to go")
    if runtime == "podman":
        done = site.run(["srun", "--nodelist=n1", "sh", "-c", loading(ready)])
        assert done.returncode == 0, done.stderr
        left = site.run(
            ["podman", "--root", f"{ready.storage}/storage", "--runroot", f"{ready.storage}/run", "ps", "-a"]
        )
        assert len(left.stdout.splitlines()) == 1, left.stdout


def test_two_that_want_it_at_once_make_it_once(site: Site, image: SiteImage, runtime: str) -> None:
    made = made_in(site, image, runtime, "both")
    script = site.write("both.sh", f"set -x\n{converting(made)}")
    job = site.submit("both", [f"srun --ntasks=2 sh {script}"])
    assert site.ended(job) == "COMPLETED", site.output("both")
    renamed = [line for line in site.output("both").splitlines() if line.startswith("+ mv -f") and "record" not in line]
    assert len(renamed) == 1
    assert sorted(path.suffix for path in Path(made.file).parent.iterdir()) == sorted(
        [Path(made.file).suffix, ".lock", ".record"]
    )


def test_what_a_killed_attempt_left_is_no_obstacle(site: Site, image: SiteImage, runtime: str) -> None:
    """Killed as it renames: a lock file, a partial one, and a record without its file."""
    made = made_in(site, image, runtime, "cut")
    text = converting(made)
    cut = text.replace('mv -f "$partial" "$file"', "kill -9 $$")
    assert cut != text
    assert site.run(["sh", "-c", cut]).returncode == -9
    left = {path.suffix for path in Path(made.file).parent.iterdir()}
    assert left == {".lock", ".record", ".partial"}
    done = site.run(["sh", "-c", text])
    assert done.returncode == 0, done.stderr
    assert ".partial" not in {path.suffix for path in Path(made.file).parent.iterdir()} and Path(made.file).exists()


def test_a_file_that_was_cut_short_is_made_anew(site: Site, image: SiteImage, runtime: str) -> None:
    made = made_in(site, image, runtime, "short")
    assert site.run(["sh", "-c", converting(made)]).returncode == 0
    size = Path(made.file).stat().st_size
    with Path(made.file).open("ab") as file:
        file.truncate(1000)
    assert site.run(["sh", "-c", converting(made)]).returncode == 0
    assert abs(Path(made.file).stat().st_size - size) < 10_000


def test_what_cannot_be_had_is_told_with_the_exit_code_of_an_image(site: Site, image: SiteImage, runtime: str) -> None:
    absent = replace(image, image=replace(image.image, id=f"{site.repository}@sha256:{'0' * 64}"))
    huge = replace(image, download=1 << 50)
    for one, says in ((absent, "made no image of"), (huge, "MiB are needed in")):
        made = made_in(site, one, runtime, "none")
        done = site.run(["sh", "-c", converting(made)])
        assert done.returncode == Exit.IMAGE and says in done.stderr.splitlines()[-1], done.stderr
        assert not Path(made.file).exists()


def test_a_job_that_is_killed_takes_no_other_with_it(
    site: Site, ready: Conversion, runtime: str, tmp_path: Path
) -> None:
    """Two of one person on one node, and a third that is made ready there while the second runs on."""
    plan = plan_for(site, runtime, tmp_path)
    alone = ("--nodes=1", "--nodelist=n1", "--ntasks=1")
    first = site.submit("first", [step(plan, ready, ["sh", "-c", "echo begun; sleep 98766"])], *alone)
    wait_for(lambda: "begun" in site.output("first"), seconds=30, what="the first")
    work = "trap 'echo ended as asked; exit 0' USR1; echo begun; while true; do sleep 0.2; done"
    second = site.submit("second", [step(plan, ready, ["sh", "-c", work])], *alone)
    wait_for(lambda: "begun" in site.output("second"), seconds=30, what="the second")
    site.run(["scancel", "--signal=KILL", "--full", first])
    site.ended(first)
    if runtime == "podman":
        done = site.run(["srun", *alone, "sh", "-c", loading(ready)])
        assert done.returncode == 0, done.stderr
    third = site.submit("third", [step(plan, ready, ["sh", "-c", "echo third"])], *alone)
    assert site.ended(third) == "COMPLETED" and "third" in site.output("third").splitlines(), site.output("third")
    assert site.state(second) == "RUNNING"
    if runtime == "podman":  # a second container of one person on a node hears no signal: see what is lost
        site.run(["scancel", "--signal=KILL", "--full", second])
        site.ended(second)
        return
    site.run(["scancel", "--signal=USR1", second])
    assert site.ended(second) == "COMPLETED" and "ended as asked" in site.output("second"), site.output("second")
