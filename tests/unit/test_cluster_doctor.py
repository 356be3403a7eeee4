"""What doctor says of a cluster, from what its commands print and what a node told; no Slurm is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from radeon_stack.errors import Exit, MachineError, UsageError
from radeon_stack.host.checks import State
from radeon_stack.host.checks.cluster import CHECKS, SAVING_SECONDS, examine_cluster
from radeon_stack.host.checks.finding import Finding
from radeon_stack.host.cluster import parse_cluster
from radeon_stack.host.cluster_facts import ClusterFacts
from radeon_stack.host.machine import Machine, probe
from radeon_stack.host.networks import interfaces, rdma
from radeon_stack.host.node import version_in
from radeon_stack.host.node_record import Interface, NodeRecord, Runtime, Shared, read_record
from radeon_stack.host.nodes import BusyError, NodeError, PythonError, SharingError, command, environment, safe, told
from radeon_stack.host.runtimes import VENV, choose_runtime
from radeon_stack.host.shared_folder import examine_shared, kind_of, offered
from radeon_stack.host.sysroot import Sysroot
from radeon_stack.launch.planner import STOP_SECONDS
from tests.conftest import ROOT, Cli
from tests.stages import STAGES, build

CONFIG = """\
AccountingStorageEnforce = none
ClusterName = lab
JobRequeue = 1
KillWait = 30 sec
PreemptMode = OFF
PreemptType = preempt/none
ProctrackType = proctrack/cgroup
SLURM_VERSION = 24.11.5
TaskPlugin = task/cgroup,task/affinity
ConstrainDevices = yes
"""
PARTITION = "PartitionName=gpus Default=YES MaxTime=2-00:00:00 GraceTime=0 State=UP\n"
NODES = "gpus|idle|32|128000|g1|gpu:r9700:1(S:0)|none\ngpus|mix|32|128000|g2|gpu:r9700:1(S:0)|none\n"
ETHERNET = Interface(name="eth0", addresses=("10.0.0.1",), up=True, speed=10000, physical=True)
LOOPBACK = Interface(name="lo", addresses=("127.0.0.1",), up=True, loopback=True)
NODE = NodeRecord(
    hostname="g1",
    node="g1",
    written=1.0,
    python="/shared/venv/bin/python",
    python_version="3.12.3",
    torch=True,
    runtimes=(Runtime(name="apptainer", version="1.3.4", path="/usr/bin/apptainer"),),
    srun=True,
    interfaces=(ETHERNET, LOOPBACK),
    shared=Shared(writable=True, free=900 << 30, kind="nfs4"),
    environment={"ROCR_VISIBLE_DEVICES": "0"},
    gpus_asked=1,
)


@pytest.fixture(scope="module")
def r9700(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return probe(Sysroot(build(STAGES["r9700"], tmp_path_factory.mktemp("r9700"))))


def facts(machine: Machine | None, *, config: str = "", partition: str = PARTITION, nodes: str = NODES) -> ClusterFacts:
    found = parse_cluster(config + CONFIG, partition, nodes)
    return ClusterFacts(
        cluster=found, partition=found.partitions[0], user="anna", node=NODE, bundle=Path("b.tar.gz"), machine=machine
    )


def finding(facts: ClusterFacts, code: str) -> Finding:
    return next(finding for check, finding in examine_cluster(facts) if check.code == code)


def test_a_healthy_cluster_is_green(r9700: Machine) -> None:
    found = {check.code: finding for check, finding in examine_cluster(facts(r9700))}
    assert {state.state for state in found.values()} == {State.OK}, found
    assert found["RS514"].evidence.startswith("apptainer: apptainer 1.3.4")
    assert found["RS518"].evidence == "eth0 10.0.0.1 (10000 Mbit/s)"


@pytest.mark.parametrize(
    ("config", "code", "state", "words"),
    [
        ("SLURM_VERSION = 19.05.5\n", "RS503", State.WARN, "older than 20.11"),
        ("SLURM_VERSION = main\n", "RS503", State.WARN, "no version"),
        ("JobRequeue = 0\n", "RS508", State.WARN, "--requeue"),
        ("PreemptType = preempt/qos\nPreemptMode = REQUEUE\n", "RS509", State.WARN, "killed after 30 s"),
        ("ProctrackType = proctrack/linuxproc\n", "RS510", State.WARN, "outlive"),
        ("TaskPlugin = task/affinity\n", "RS511", State.WARN, "another one"),
        ("ConstrainDevices = no\n", "RS511", State.WARN, "another one"),
        ("AccountingStorageEnforce = associations,limits\n", "RS506", State.SKIPPED, "sacctmgr"),
    ],
)
def test_what_slurm_is_set_to_is_judged(r9700: Machine, config: str, code: str, state: State, words: str) -> None:
    found = finding(facts(r9700, config=config), code)
    assert found.state is state and words in found.evidence, found
    assert state is not State.WARN or code in ("RS503", "RS508") or found.remedy


@pytest.mark.parametrize(
    ("line", "code", "state"),
    [
        ("PartitionName=gpus Default=YES MaxTime=UNLIMITED State=DOWN\n", "RS504", State.FAIL),
        ("PartitionName=gpus Default=YES MaxTime=04:00 State=UP\n", "RS509", State.FAIL),
        ("PartitionName=gpus Default=YES MaxTime=20:00 State=UP\n", "RS509", State.WARN),
        ("PartitionName=none Default=YES MaxTime=UNLIMITED State=UP\n", "RS505", State.FAIL),
    ],
)
def test_a_partition_is_judged(r9700: Machine, line: str, code: str, state: State) -> None:
    assert finding(facts(r9700, partition=line), code).state is state


def test_an_account_is_asked_for_where_one_is_needed(r9700: Machine) -> None:
    asked = facts(r9700, config="AccountingStorageEnforce = safe\n")
    assert finding(replace(asked, accounts=()), "RS506").state is State.FAIL
    assert finding(replace(asked, accounts=("physics",)), "RS506").evidence == "yours: physics"


def test_nodes_that_are_down_are_told_with_their_reasons(r9700: Machine) -> None:
    one = facts(r9700, nodes="gpus|idle|1|1|g1|gpu:1|none\ngpus|drain|1|1|g2|gpu:1|fan \x1b[31mbroken\n")
    found = finding(one, "RS505")
    assert found.state is State.WARN and "g2 drain: fan" in found.evidence and "\x1b" not in found.evidence
    none = facts(r9700, nodes="gpus|down*|1|1|g1|(null)|Not responding\n")
    assert finding(none, "RS505").state is State.FAIL


def test_cards_that_slurm_does_not_count_come_with_the_lines_to_write(r9700: Machine) -> None:
    found = finding(facts(r9700, nodes="gpus|idle|1|1|g1|(null)|none\n"), "RS507")
    assert found.state is State.FAIL and "1 Radeons, and Slurm counts none" in found.evidence
    told = "\n".join(found.remedy)
    assert "AutoDetect=rsmi" in told and "Name=gpu File=/dev/dri/renderD128 Flags=amd_gpu_env" in told


def test_counts_that_differ_lead_to_the_nodes_own_doctor(r9700: Machine) -> None:
    more = facts(r9700, nodes="gpus|idle|1|1|g1|gpu:4|none\n")
    assert finding(more, "RS507").remedy == ("radeon-stack doctor --sysroot b.tar.gz",)
    none = replace(more, machine=Machine.unknown())
    assert finding(more, "RS507").state is State.WARN and finding(none, "RS507").state is State.FAIL


def test_a_cluster_for_the_cpu_has_nothing_to_count() -> None:
    cpu = facts(Machine.unknown(), nodes="gpus|idle|2|8000|g1|(null)|none\n")
    assert finding(cpu, "RS507").state is State.OK
    assert finding(cpu, "RS511").state is State.SKIPPED


@pytest.mark.parametrize(
    ("changes", "code", "state", "words"),
    [
        ({"runtimes": ()}, "RS514", State.WARN, "the Python of the shared file system"),
        ({"runtimes": (), "torch": False}, "RS513", State.FAIL, "without torch"),
        ({"torch": False}, "RS513", State.OK, "which a container has"),
        ({"shared": Shared(writable=True, locks="flock: no", kind="lustre")}, "RS515", State.FAIL, "lustre"),
        ({"shared": Shared(writable=True, clock_offset=-40.0)}, "RS516", State.WARN, "40 s behind this host's"),
        ({"shared": Shared(writable=True, mtime_offset=9.0)}, "RS516", State.WARN, "9 s ahead of the file system's"),
        ({"shared": Shared(writable=True, free=1 << 30)}, "RS517", State.WARN, "1GiB free"),
        ({"interfaces": (LOOPBACK,)}, "RS518", State.FAIL, "no job can span nodes"),
        ({"environment": {}}, "RS519", State.WARN, "not told"),
        (
            {"environment": {"ROCR_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "1"}},
            "RS519",
            State.WARN,
            "CUDA_VISIBLE_DEVICES too",
        ),
    ],
)
def test_what_a_node_told_is_judged(
    r9700: Machine, changes: dict[str, Any], code: str, state: State, words: str
) -> None:
    found = finding(replace(facts(r9700), node=NODE.model_copy(update=changes)), code)
    assert found.state is state and words in found.evidence, found


@pytest.mark.parametrize(
    ("error", "failing"),
    [
        (BusyError("no node was free within 60 s"), set()),
        (PythonError("this Python does not run"), {"RS513"}),
        (SharingError("is not the submit host's folder"), {"RS515"}),
        (NodeError("srun: something else"), {"RS512"}),
    ],
)
def test_a_node_that_could_not_be_asked_is_told_where_it_belongs(error: NodeError, failing: set[str]) -> None:
    unasked = replace(facts(None), node=None, bundle=None, node_error=error)
    found = {check.code: finding.state for check, finding in examine_cluster(unasked)}
    assert {code for code, state in found.items() if state is State.FAIL} == failing
    assert found["RS516"] is found["RS518"] is State.SKIPPED


def test_without_a_client_or_a_controller_only_that_fails() -> None:
    for gone, code in ((ClusterFacts(("sinfo",)), "RS501"), (ClusterFacts(why_not="Unable to contact"), "RS502")):
        states = {check.code: finding.state for check, finding in examine_cluster(gone)}
        assert [one for one, state in states.items() if state is State.FAIL] == [code]
        assert sum(state is State.SKIPPED for state in states.values()) >= len(CHECKS) - 2


def test_codes_are_in_order_and_on_the_page_that_findings_link_to() -> None:
    codes = [check.code for check in CHECKS]
    assert codes == sorted(codes) and len(set(codes)) == len(codes)
    page = (ROOT / "docs/doctor.md").read_text()
    for code in codes:
        assert f'<a id="{code.lower()}"></a>' in page, f"{code}: make docs"


def test_the_time_to_save_is_the_launchers() -> None:
    assert SAVING_SECONDS == STOP_SECONDS


def test_options_that_make_no_sense_together_are_refused(cli: Cli, tmp_path: Path) -> None:
    for words in (
        ("--partition", "gpus"),
        ("--engine", "slurm", "--fix"),
        ("--engine", "slurm", "--bundle", tmp_path / "b"),
        ("--engine", "slurm", "--sysroot", tmp_path),
        ("--engine", "k8s"),
    ):
        assert cli("doctor", *words).code == Exit.USAGE, words


def test_the_first_runtime_that_works_is_taken() -> None:
    podman = Runtime(name="podman", version="5.4.2", why_not="/etc/subuid has no range for this user")
    singularity, enroot = Runtime(name="singularity", version="4.1.0"), Runtime(name="enroot", version="3.5.0")
    node = NODE.model_copy(update={"runtimes": (podman, enroot, singularity)})
    assert choose_runtime(node).name == "singularity"
    node = NODE.model_copy(update={"runtimes": (podman, enroot), "pyxis": True})
    assert choose_runtime(node).why == "pyxis with enroot 3.5.0 is on g1"
    node = NODE.model_copy(update={"runtimes": (podman,), "pyxis": True})
    assert choose_runtime(node).name == VENV


def test_a_runtime_that_is_asked_for_is_taken_or_refused() -> None:
    assert choose_runtime(NODE, "apptainer").why == choose_runtime(NODE, VENV).why == "asked for"
    with pytest.raises(UsageError, match="did you mean 'apptainer'"):
        choose_runtime(NODE, "aptainer")
    with pytest.raises(MachineError, match=r"no podman on g1; what can be used there: apptainer, venv"):
        choose_runtime(NODE, "podman")
    with pytest.raises(MachineError, match="no --container-image"):
        choose_runtime(NODE, "pyxis")
    broken = Runtime(name="podman", why_not="there is no newuidmap")
    with pytest.raises(MachineError, match="podman on g1: there is no newuidmap"):
        choose_runtime(NODE.model_copy(update={"runtimes": (broken,)}), "podman")


def test_a_record_from_a_node_is_bounded_and_harmless(tmp_path: Path) -> None:
    file = tmp_path / "a.node.json"
    assert read_record(file) is None
    file.write_text(NODE.model_copy(update={"hostname": "g1\x1b[2J\nroot"}).model_dump_json())
    record = read_record(file)
    assert record is not None and record.hostname == "g1�[2J root"
    file.write_text('{"hostname": "a", "written": 1, "news": {"of": "a later version"}}')
    assert read_record(file) == NodeRecord(hostname="a", written=1)
    for text in (
        "",
        "[]",
        "{}",
        '{"hostname": "a", "written": NaN}',
        '{"hostname": 1}',
        "[" * 100_000,
        "x" * (1 << 20),
    ):
        file.write_text(text)
        with pytest.raises(MachineError, match="is no node's record"):
            read_record(file)
    with pytest.raises(ValidationError):
        NodeRecord(hostname="a", written=1, interfaces=(LOOPBACK,) * 1000)


def test_a_folder_is_shared_when_the_token_is_seen_and_its_lock_is_felt(tmp_path: Path) -> None:
    with offered(tmp_path, "main.1", "1234"):
        found = examine_shared(tmp_path, "main.1", "1234")
        assert found.writable and found.locks == "" and found.free and found.kind
        with pytest.raises(MachineError, match="is not the submit host's folder"):
            examine_shared(tmp_path, "main.1", "4321")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "main.1.token").write_text("1234")
    assert "does not see the lock" in examine_shared(tmp_path, "main.1", "1234").locks


def test_the_file_systems_kind_is_that_of_the_innermost_mount(tmp_path: Path) -> None:
    mounts = f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\nb {tmp_path}x lustre rw 0 0\nbroken\n"
    assert kind_of(tmp_path / "home", mounts) == "nfs4"
    assert kind_of(Path("/"), mounts) == "ext4" and kind_of(tmp_path, "") == ""


def test_interfaces_and_rdma_devices_are_read_from_sysfs(tmp_path: Path) -> None:
    files = {
        "sys/class/net/ib0/flags": "0x1043",
        "sys/class/net/ib0/operstate": "up",
        "sys/class/net/ib0/speed": "100000",
        "sys/class/net/lo/flags": "0x9",
        "sys/class/net/lo/operstate": "unknown",
        "sys/class/net/eth1/flags": "nonsense",
        "sys/class/net/eth1/speed": "-1",
        "sys/class/infiniband/mlx5_0/ports/1/link_layer": "InfiniBand",
        "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE",
        "sys/class/infiniband/mlx5_0/ports/1/rate": "100 Gb/sec (4X EDR)",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    eth1, ib0, lo = interfaces(Sysroot(tmp_path))
    assert ib0.up and ib0.speed == 100000 and lo.loopback and lo.up and not eth1.up and eth1.speed is None
    (port,) = rdma(Sysroot(tmp_path))
    assert (port.name, port.link, port.state, port.rate) == ("mlx5_0", "InfiniBand", "ACTIVE", "100 Gb/sec (4X EDR)")


def test_the_question_is_a_job_of_a_minute_or_two_and_knows_no_other_job(monkeypatch: pytest.MonkeyPatch) -> None:
    partition = parse_cluster(CONFIG, PARTITION, NODES).partitions[0]
    words = command(partition, Path("/h/cluster"), "gpus.1", "1", 1, 60)
    assert words[:4] == ["srun", "--partition=gpus", "--nodes=1", "--ntasks=1"]
    assert {"--time=2", "--immediate=60", "--gpus-per-node=1", "--chdir=/", "--export=ALL"} <= set(words)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    monkeypatch.setenv("PYTHONPATH", "/other")
    variables = environment()
    assert "SLURM_CPUS_PER_TASK" not in variables and variables["SLURM_CONF"] == "/etc/slurm/slurm.conf"
    assert variables["PYTHONPATH"] == f"{ROOT}:/other"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("srun: error: Unable to allocate resources: Requested nodes are busy", BusyError),
        ("slurmstepd-n1: error: execve(): /home/a/python: No such file or directory", PythonError),
        ("/h/python: Error while finding module specification: No module named radeon_stack", PythonError),
        ("radeon-stack: /h: is not the submit host's folder on this node; it has to lie", SharingError),
        ("radeon-stack: /h: cannot be written on this node: Permission denied", SharingError),
        ("srun: error: Invalid account or account/partition combination specified", NodeError),
    ],
)
def test_sruns_words_are_told_as_ours(said: str, kind: type[NodeError]) -> None:
    partition = parse_cluster(CONFIG, PARTITION, NODES).partitions[0]
    error = told(MachineError(said), partition, Path("/h"), 60)
    assert type(error) is kind and error.where


def test_names_of_a_cluster_never_lead_out_of_the_home_folder() -> None:
    assert safe("../../etc") == "______etc" and safe("") == "_" and len(safe("a" * 1000)) == 100


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("apptainer version 1.3.4", "1.3.4"),
        ("singularity-ce version 4.1.0-noble", "4.1.0-noble"),
        ("podman version 4.3.1", "4.3.1"),
        ("3.5.0", "3.5.0"),
        ("", ""),
    ],
)
def test_a_runtimes_version_is_found_in_what_it_says(said: str, version: str) -> None:
    assert version_in(said) == version
