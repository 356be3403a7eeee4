"""What Slurm's commands print, read: recorded from Slurm 22.05, and GPUs as gres.conf(5) and sinfo(1) have them."""

from __future__ import annotations

import pytest

from radeon_stack.errors import MachineError, UsageError
from radeon_stack.host.cluster import (
    Cluster,
    Gres,
    find_partition,
    minutes,
    parse_cluster,
    parse_gres,
    parse_members,
    partition_named,
)

CONFIG = """\
Configuration data as of 2026-11-29T22:04:46
AccountingStorageEnforce = none
ClusterName             = stand-in
JobRequeue              = 1
KillWait                = 20 sec
MULTIPLE_SLURMD         = Yes
PowerPlugin             = \n\
ProctrackType           = proctrack/linuxproc
SchedulerParameters     = batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
SlurmctldHost[0]        = vm(127.0.0.1)
SLURM_VERSION           = 22.05.8
TaskPlugin              = task/none

Cgroup Support Configuration:
ConstrainDevices        = yes
ConstrainRAMSpace       = no

Slurmctld(primary) at vm is UP
"""
MAIN = (
    "PartitionName=main AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A "
    "DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=20 Hidden=NO MaxNodes=UNLIMITED "
    "MaxTime=UNLIMITED MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=n[1-2] PriorityJobFactor=1 PriorityTier=1 "
    "RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=REQUEUE State=UP TotalCPUs=4 "
    "TotalNodes=2 SelectTypeParameters=NONE JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED "
    "TRES=cpu=4,mem=23592M,node=2,billing=4\n"
)
GPUS = "PartitionName=gpus Default=NO DefaultTime=01:00:00 MaxTime=2-12:30:00 Nodes=g[1-2] State=UP\n"
OLD = "PartitionName=old Default=NO MaxTime=UNLIMITED Nodes=o1 State=DRAIN\n"
NODES = """\
main|idle|2|11796|n1|(null)|none
main|down*|2|11796|n2|(null)|Not responding
gpus|mix|32|128000|g1|gpu:r9700:4(S:0-1)|none
gpus|drain|16|64000|g2|gpu:r9700:2(S:0,1),nic:1|fan | replaced on Monday
"""


def told() -> Cluster:
    return parse_cluster(CONFIG, MAIN + GPUS + OLD, NODES)


def test_a_cluster_is_named_and_has_its_partitions_in_their_order() -> None:
    cluster = told()
    assert (cluster.name, cluster.version) == ("stand-in", "22.05.8")
    assert [one.name for one in cluster.partitions] == ["main", "gpus", "old"]
    assert cluster.settings["KillWait"] == "20 sec" and cluster.settings["ConstrainDevices"] == "yes"


def test_a_partition_has_the_least_of_its_nodes_and_the_most_of_their_gpus() -> None:
    _, gpus, _ = told().partitions
    assert (gpus.nodes, gpus.idle, gpus.cpus, gpus.memory) == (2, 0, 16, 64000 << 20)
    assert gpus.gres == (Gres("gpu", "r9700", 4), Gres("nic", "", 1)) and gpus.gpus == 4
    assert gpus.max_minutes == 2 * 1440 + 12 * 60 + 30 and gpus.default_minutes == 60


def test_a_partition_tells_how_it_is_preempted_and_whether_it_is_the_default() -> None:
    main, gpus, old = told().partitions
    assert main.default and main.up and main.max_minutes is None and main.idle == 1
    assert (main.preempt, main.grace) == ("REQUEUE", 20)
    assert not gpus.default and gpus.preempt == "" and not old.up and old.nodes == 0


def test_a_node_out_of_use_tells_why_whatever_was_typed() -> None:
    members = parse_members(NODES)
    assert [one.broken for one in (*members["main"], *members["gpus"])] == [False, True, False, True]
    assert members["gpus"][1].reason == "fan | replaced on Monday" and members["main"][0].reason == ""


@pytest.mark.parametrize(("state", "idle", "broken"), [("idle~", True, False), ("idle*", False, True), ("mix", 0, 0)])
def test_marks_behind_a_state_are_read(state: str, idle: bool, broken: bool) -> None:
    (member,) = parse_members(f"p|{state}|1|1|n|(null)|none")["p"]
    assert (member.idle, member.broken) == (bool(idle), bool(broken))


@pytest.mark.parametrize(
    ("text", "gres"),
    [
        ("(null)", ()),
        ("N/A", ()),
        ("", ()),
        ("gpu:2", (Gres("gpu", "", 2),)),
        ("gpu", (Gres("gpu", "", 1),)),
        ("gpu:rx7900xtx:1(S:0),shard:8(S:0)", (Gres("gpu", "rx7900xtx", 1), Gres("shard", "", 8))),
        ("gpu:2(IDX:0-1),lustre:no_consume:4K", (Gres("gpu", "", 2), Gres("lustre", "", 4096))),
        ("gpu:7900_xt:2", (Gres("gpu", "7900_xt", 2),)),
    ],
)
def test_generic_resources_are_read_as_slurm_prints_them(text: str, gres: tuple[Gres, ...]) -> None:
    assert parse_gres(text) == gres


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("UNLIMITED", None),
        ("NONE", None),
        ("30", 30),
        ("30:30", 30),
        ("01:30:00", 90),
        ("1-0", 1440),
        ("2-01:02:03", 2942),
    ],
)
def test_times_are_minutes(text: str, found: int | None) -> None:
    assert minutes(text) == found


def test_what_is_not_slurm_is_no_cluster_and_no_traceback() -> None:
    for text in ("", "PartitionName\n", "|||||\x1b[2J|", "=\n= =\n", "a|b"):
        made = parse_cluster(text, text, text)
        assert not made.partitions and "\x1b" not in repr(made)
    wild = parse_cluster(
        "", "PartitionName=a\x1b[2J GraceTime=9e9 MaxTime=x-y\n", "a|idle|99999999999999999999999|z|n|:::|"
    )
    assert [one.name for one in wild.partitions] == ["a�[2J"] and wild.partitions[0].cpus == 0


def test_a_partition_is_found_by_its_name_and_without_one_the_default_is() -> None:
    assert partition_named(told(), "gpus").name == "gpus"
    assert partition_named(told(), None).name == "main"


def test_a_partition_that_is_not_there_is_a_bad_value_and_the_others_are_told() -> None:
    with pytest.raises(UsageError, match="did you mean 'gpus'") as raised:
        partition_named(told(), "gpu")
    assert raised.value.remedy == "allowed: gpus, main, old"
    with pytest.raises(UsageError, match="no default partition"):
        partition_named(parse_cluster(CONFIG, GPUS, NODES), None)


def test_a_partition_that_is_down_is_a_machine_that_cannot() -> None:
    with pytest.raises(MachineError, match=r"old is drain.*main, gpus"):
        partition_named(told(), "old")
    assert find_partition(told(), "old").state == "DRAIN"
