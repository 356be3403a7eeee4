"""Every machine that we know of, as a tree of files: its GPUs, what a run is given of them, and doctor's word on it."""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from radeon_stack.catalog.load import Effective, read, resolve
from radeon_stack.catalog.platforms import load_platforms
from radeon_stack.errors import Exit, MachineError, StackError, UsageError
from radeon_stack.host.bundle import pack
from radeon_stack.host.checks import State, examine
from radeon_stack.host.engines import EngineProbe
from radeon_stack.host.facts import Facts, clocks, from_files, gather, needs
from radeon_stack.host.gpus import Gpu, topology
from radeon_stack.host.kfd import gfx_name, numbers
from radeon_stack.host.known_issues import mitigations
from radeon_stack.host.machine import Machine, probe
from radeon_stack.host.selection import Selection, select
from radeon_stack.host.sysroot import LIMIT, Sysroot
from radeon_stack.images.resolve import Image
from radeon_stack.launch.access import container_access, local_env
from radeon_stack.launch.choose import Choice
from radeon_stack.launch.circumstances import Circumstances, setup
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.launch.planner import plan
from tests.conftest import Cli
from tests.shapes import folder_of
from tests.stages import (
    MI300X,
    R9700,
    RAPHAEL,
    RX7900XTX,
    RX9060XT,
    STAGES,
    STRIX_HALO,
    Card,
    Stage,
    build,
    cpx,
    specification,
)

GOLDEN = Path(__file__).parent / "golden" / "hosts.txt"
DOCKER = EngineProbe("unix:///var/run/docker.sock", "28.5.2")
ENGINES = {
    "docker": DOCKER,
    "rootless docker": replace(DOCKER, rootless=True),
    "docker desktop": replace(DOCKER, desktop=True),
    "rootless podman": replace(DOCKER, product="podman", version="5.4.2", rootless=True),
}


CDI = specification(("card1", "renderD128"), ("card2", "renderD129"))


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sysroot]:
    root = tmp_path_factory.mktemp("stages")
    return {name: Sysroot(build(stage, root / name)) for name, stage in STAGES.items()}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Effective:
    model = folder_of(tmp_path_factory.mktemp("model"), {}, {})
    flags = {"--model": {"config": {"model": str(model)}}}
    return resolve(read("train-llama"), None, ["resources.gpus.max=8"], flags)


def planned(effective: Effective, tree: Sysroot, asked: str | None, engine: EngineProbe | None) -> LaunchPlan:
    machine = probe(tree)
    chosen = select(machine.gpus, asked, least=1, most=8, wsl=machine.wsl)
    gfx = chosen.gpus[0].gfx
    rocm = load_platforms().release_for(gfx)
    image = Image("sha256:" + "a" * 64, "radeon-stack/train", "it fits", gfx, rocm, "2.9.1")
    choice = Choice("docker", image, "asked for", engine) if engine else Choice("local", None, "asked for")
    asked_for = mitigations(setup(machine, chosen, choice))
    here = Circumstances(machine, chosen, choice, asked_for, sysroot=tree)
    return plan(effective, here, run_id="r", run_dir=tree.root, cache=tree.root / "cache")


def test_known_issues_are_looked_up_for_the_gpus_and_machines_of_all_nodes(trees: dict[str, Sysroot]) -> None:
    machine = probe(trees["three-r9700"])
    chosen = select(machine.gpus, "all", least=1, most=8)
    choice = Choice("slurm", None, "asked for")
    alone, job = setup(machine, chosen, choice), setup(machine, chosen, choice, nodes=4)
    assert (alone.gpus, alone.nodes) == (3, 1)
    assert (job.gpus, job.nodes) == (12, 4)


def access_lines(effective: Effective, tree: Sysroot) -> list[str]:
    lines = []
    machine = probe(tree)
    ways = [None, "all", "0,1", ">=24GiB", "gfx1201"] if not machine.wsl else [None, "gfx1201"]
    for asked in ways:
        for name, engine in [*ENGINES.items(), ("local", None)]:
            if asked and name != "docker":
                continue
            try:
                made = planned(effective, tree, asked, engine)
            except StackError as error:
                lines.append(f"  {name}, {asked or 'default'}: refused ({error.exit_code}): {error}")
                continue
            said = [f"gpus {' '.join(made.gpus) or '-'}", f"devices {' '.join(made.devices) or '-'}"]
            said += [f"groups {' '.join(made.groups) or '-'}", f"user {made.user}"]
            why = {name: made.reasons[f"env.{name}"] for name, _ in made.env}
            telling = [f"{k}={v}" for k, v in made.env if "VISIBLE" in k or why[k].startswith(("RS-KI", "WSL"))]
            said += [f"env {' '.join(telling) or '-'}", f"unset {' '.join(made.unset) or '-'}"]
            lines.append(f"  {name}, {asked or 'default'}: {'; '.join(said)}")
    return lines


def test_every_known_machine_gives_its_gpus_its_plan_and_doctors_word(
    trees: dict[str, Sysroot], recipe: Effective
) -> None:
    text = ""
    for name, tree in trees.items():
        found = topology(tree)
        text += f"== {name}\n"
        for gpu in found.gpus:
            text += f"  gpu {gpu.index}: {gpu.gfx}, {gpu.name}, {gpu.memory} bytes, {gpu.compute_units} CUs, "
            text += f"{gpu.render_node}, {gpu.pci}, partition {gpu.partition}, {gpu.unique_id or 'no id'}, "
            text += f"numa {gpu.numa_node}{', integrated' if gpu.integrated else ''}\n"
        text += "\n".join(access_lines(recipe, tree)) + "\n"
        for check, finding in examine(gather(tree, Path("/"))):
            if finding.state is not State.SKIPPED:
                text += f"  {finding.state:4} {check.code}: {finding.evidence}\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize(
    ("version", "name"),
    [
        (120001, "gfx1201"),
        (110000, "gfx1100"),
        (110501, "gfx1151"),
        (90010, "gfx90a"),
        (90402, "gfx942"),
        (90500, "gfx950"),
        (0, ""),
        (9, ""),
        (10**19, ""),
    ],
)
def test_gfx_names_are_decoded_with_minor_and_stepping_in_hex(version: int, name: str) -> None:
    assert gfx_name(version) == name


def test_a_render_node_that_kfd_does_not_tell_is_found_through_the_pci_device(tmp_path: Path) -> None:
    build(Stage((replace(R9700, extra={"drm_render_minor": 0}),)), tmp_path)
    assert [gpu.render_node for gpu in topology(Sysroot(tmp_path)).gpus] == ["/dev/dri/renderD128"]


def test_a_card_without_any_render_node_is_seen_and_refused_by_name(tmp_path: Path) -> None:
    build(Stage((replace(R9700, extra={"drm_render_minor": 0}, driver=""),)), tmp_path)
    gpus = topology(Sysroot(tmp_path)).gpus
    with pytest.raises(MachineError, match=r"GPU 0 .*tells no render node"):
        select(gpus, "0", least=1, most=1)


def test_a_node_that_may_not_be_read_is_a_problem_and_not_a_gpu(tmp_path: Path) -> None:
    """As in a container that was given one of two cards: the other's properties cannot be read."""
    build(Stage((R9700, RX7900XTX)), tmp_path)
    hidden = tmp_path / "sys/class/kfd/kfd/topology/nodes/2/properties"
    hidden.unlink()
    hidden.mkdir()  # unreadable for root too
    found = topology(Sysroot(tmp_path))
    assert [gpu.gfx for gpu in found.gpus] == ["gfx1201"] and found.problems == ("node 2: properties unreadable",)


def test_an_old_apus_node_is_cpu_and_gpu_at_once(tmp_path: Path) -> None:
    build(Stage((replace(RAPHAEL, extra={"cpu_cores_count": 8}),)), tmp_path)
    found = topology(Sysroot(tmp_path))
    assert found.cpus == 2 and [gpu.integrated for gpu in found.gpus] == [True]


def test_a_card_of_which_the_cpu_sees_a_window_only_is_told_apart(tmp_path: Path) -> None:
    build(Stage((replace(R9700, heap=2),)), tmp_path)
    gpu = topology(Sysroot(tmp_path)).gpus[0]
    assert gpu.vram == R9700.vram and gpu.visible_vram == 256 << 20
    states = {check.code: finding.state for check, finding in examine(gather(Sysroot(tmp_path), Path("/")))}
    assert states["RS116"] is State.WARN


def test_an_apus_memory_is_what_kfd_gives_out_and_not_what_it_could_map(trees: dict[str, Sysroot]) -> None:
    gpu = probe(trees["strix-halo"]).gpus[0]
    assert gpu.memory == STRIX_HALO.bank == 67076653056 and gpu.gtt == 128 << 30


def test_a_compute_apu_tells_its_memory_in_its_banks_alone(tmp_path: Path) -> None:
    """MI300A: no VRAM of its own, and nothing is small about its BAR."""
    root = build(Stage((replace(MI300X, device=0x74A0),)), tmp_path)
    for name in ("mem_info_vram_total", "mem_info_vis_vram_total"):
        (root / "sys/bus/pci/devices/0000:05:00.0" / name).write_text("0\n")
    gpu = topology(Sysroot(root)).gpus[0]
    assert gpu.memory == gpu.visible_vram == MI300X.vram and gpu.name == "AMD Instinct MI300A"


def test_cards_that_reach_each_other_over_pcie_are_linked(tmp_path: Path) -> None:
    root = build(STAGES["three-r9700"], tmp_path)
    link = root / "sys/class/kfd/kfd/topology/nodes/1/p2p_links/0/properties"
    link.parent.mkdir(parents=True)
    link.write_text("type 2\nnode_from 1\nnode_to 2\nweight 40\n")
    assert [(found.to, found.weight) for found in topology(Sysroot(root)).gpus[0].links] == [(0, 20), (2, 40)]


def test_partitions_are_told_apart_whichever_way_the_kernel_numbers_them(tmp_path: Path) -> None:
    """Bits 31:28 of the location in some kernels, the function's three bits in others."""
    build(STAGES["mi300x-cpx"], tmp_path)
    for number in range(1, 9):
        place = tmp_path / f"sys/class/kfd/kfd/topology/nodes/{number}/properties"
        text = place.read_text()
        assert f"location_id {0x500 | number - 1}\n" in text
        place.write_text(text.replace(f"location_id {0x500 | number - 1}", f"location_id {0x500 | (number - 1) << 28}"))
    gpus = topology(Sysroot(tmp_path)).gpus
    assert [gpu.partition for gpu in gpus] == list(range(8)) and {gpu.pci for gpu in gpus} == {"0000:05:00.0"}
    assert len({gpu.render_node for gpu in gpus}) == 8


def test_the_last_line_of_a_half_written_file_is_not_believed() -> None:
    assert numbers("simd_count 128\ngfx_target_version 1200") == {"simd_count": 128}
    assert numbers("simd_count 128\ngfx_target_version 120001\n")["gfx_target_version"] == 120001


@pytest.mark.parametrize(
    ("asked", "indices"),
    [
        (None, [0, 1]),
        ("all", [0, 1]),
        ("1", [1]),
        ("1,0", [0, 1]),
        ("gfx1201", [0, 1]),
        (">=30GiB", [0, 1]),
        ("2", [2]),
    ],
)
def test_gpus_are_chosen_as_asked_and_an_integrated_one_only_by_its_number(
    trees: dict[str, Sysroot], asked: str | None, indices: list[int]
) -> None:
    gpus = probe(trees["two-r9700-and-igpu"]).gpus
    assert [gpu.index for gpu in select(gpus, asked, least=1, most=4).gpus] == indices


@pytest.mark.parametrize(
    ("stage", "asked", "says"),
    [
        ("rx9070-and-rx9060xt", "all", r"these are gfx1201 and gfx1200; choose: --gpus gfx1201 or --gpus gfx1200"),
        ("rx9070-and-rx9060xt", "0,1", r"these are gfx1201 and gfx1200"),
        ("r9700", "1", r"no GPU 1; there are: 0 \(AMD Radeon AI PRO R9700\)"),
        ("r9700", "0,0", "named twice"),
        ("r9700", ">=48GiB", "0 of 1 on this machine are meant"),
        ("r9700", ">=48", "is no size"),
        ("r9700", "first", "is no selection of GPUs; give 0,2 or all"),
        ("three-r9700", "0,1,2", "takes at most 2 GPUs, not 3"),
        ("no-driver", None, "needs 1 GPU; no GPU is visible"),
        ("wsl2", None, "WSL2 does not tell which GPU it is; say it: --gpus gfx1201"),
    ],
)
def test_a_selection_that_cannot_be_is_refused_with_the_reason(
    trees: dict[str, Sysroot], stage: str, asked: str | None, says: str
) -> None:
    machine = probe(trees[stage])
    with pytest.raises((MachineError, UsageError), match=says):
        select(machine.gpus, asked, least=1, most=2, wsl=machine.wsl)


def test_a_24_gib_card_is_meant_by_24_gib_though_it_tells_a_little_less(trees: dict[str, Sysroot]) -> None:
    gpus = probe(trees["rx7900xtx"]).gpus
    assert gpus[0].memory < 24 << 30 and select(gpus, ">=24GiB", least=1, most=1).gpus == gpus


def test_a_card_in_use_is_passed_over_and_asked_for_by_number_it_is_refused(trees: dict[str, Sysroot]) -> None:
    gpus = probe(trees["three-r9700"]).gpus
    assert [g.index for g in select(gpus, None, least=1, most=2, busy={0: "run a"}).gpus] == [1, 2]
    with pytest.raises(MachineError, match=r"GPU 0 is in use by run a; .*--share"):
        select(gpus, "0", least=1, most=1, busy={0: "run a"})
    with pytest.raises(MachineError, match="in use by"):
        select(gpus, "all", least=1, most=3, busy={0: "a", 1: "b", 2: "c"})


def test_visibility_is_set_once_for_a_process_without_a_container_and_never_for_one_in_it(
    trees: dict[str, Sysroot], recipe: Effective
) -> None:
    alone = planned(recipe, trees["three-r9700"], "0,2", None)
    assert dict(alone.env)["ROCR_VISIBLE_DEVICES"] == "0,2"
    assert set(alone.unset) == {"HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"}
    inside = planned(recipe, trees["three-r9700"], "0,2", DOCKER)
    assert not [name for name, _ in inside.env if "VISIBLE" in name]
    assert inside.devices == ("/dev/kfd", "/dev/dri/renderD128", "/dev/dri/renderD130")


def test_a_gpu_whose_render_node_is_not_there_is_not_counted(tmp_path: Path) -> None:
    """As ROCr counts: a container that was given the second card only sees it as number 0."""
    tree = Sysroot(build(STAGES["three-r9700"], tmp_path))
    machine = probe(tree)
    fewer = {path: node for path, node in machine.nodes.items() if path != "/dev/dri/renderD128"}
    env, _ = local_env(replace(machine, nodes=fewer), machine.gpus[1:])
    assert env[0][:2] == ("ROCR_VISIBLE_DEVICES", "0,1")


def test_a_recipe_that_sets_visibility_itself_is_refused(trees: dict[str, Sysroot], recipe: Effective) -> None:
    own = resolve(read("train-llama"), "demo", ["env.HIP_VISIBLE_DEVICES='0'"])
    with pytest.raises(UsageError, match=r"env.HIP_VISIBLE_DEVICES.*use --gpus"):
        planned(own, trees["r9700"], None, DOCKER)


def test_cdi_names_are_used_when_the_specification_means_exactly_the_chosen_cards(tmp_path: Path) -> None:
    build(replace(STAGES["three-r9700"], files={"/etc/cdi/amd.json": CDI}), tmp_path)
    tree = Sysroot(tmp_path)
    machine, engine = probe(tree), replace(DOCKER, cdi=True)
    fits = container_access(machine, machine.gpus[:2], engine, tree)
    assert fits.devices == ("amd.com/gpu=0", "amd.com/gpu=1") and fits.groups == ("992",)
    assert container_access(machine, machine.gpus[2:], engine, tree).devices == ("/dev/kfd", "/dev/dri/renderD130")
    assert container_access(machine, machine.gpus[:1], DOCKER, tree).devices == ("/dev/kfd", "/dev/dri/renderD128")


def test_the_only_card_is_meant_by_its_number_though_all_means_it_too(tmp_path: Path) -> None:
    one = {"/etc/cdi/amd.json": specification(("card1", "renderD128"))}
    tree = Sysroot(build(replace(STAGES["r9700"], files=one), tmp_path))
    machine = probe(tree)
    assert container_access(machine, machine.gpus, replace(DOCKER, cdi=True), tree).devices == ("amd.com/gpu=0",)


def test_a_partition_has_a_cdi_name_of_its_own_with_its_own_card_node(tmp_path: Path) -> None:
    parts = specification(*((f"card{n + 1}", f"renderD{128 + n}") for n in range(8)))
    tree = Sysroot(build(replace(STAGES["mi300x-cpx"], files={"/etc/cdi/amd.json": parts}), tmp_path))
    machine = probe(tree)
    given_ = container_access(machine, machine.gpus[2:4], replace(DOCKER, cdi=True), tree)
    assert given_.devices == ("amd.com/gpu=2", "amd.com/gpu=3")


@pytest.mark.parametrize(
    "worse",
    [
        CDI.replace('"path": "/dev/kfd"', '"path": "/dev/mem"'),
        CDI.replace('"path": "/dev/dri/card1"', '"path": "/dev/dri/card2"'),
        CDI.replace('"containerEdits": {}', '"containerEdits": {"hooks": [{"path": "/x"}]}'),
        CDI.replace('"containerEdits": {}', '"containerEdits": {"deviceNodes": [{"path": "/dev/mem"}]}'),
        CDI.replace('"path": "/dev/kfd"', '"path": "/dev/kfd", "hostPath": "/dev/sda"'),
        CDI[:-1],
        "[]",
        "{}",
        '{"kind": "amd.com/gpu", "devices": 3}',
    ],
)
def test_a_specification_that_brings_anything_else_is_not_used(tmp_path: Path, worse: str) -> None:
    build(replace(STAGES["r9700"], files={"/etc/cdi/amd.json": worse}), tmp_path)
    tree = Sysroot(tmp_path)
    machine = probe(tree)
    given_ = container_access(machine, machine.gpus, replace(DOCKER, cdi=True), tree)
    assert given_.devices == ("/dev/kfd", "/dev/dri/renderD128")


def test_wsl2_without_the_way_to_windows_driver_is_refused_by_its_name(tmp_path: Path, recipe: Effective) -> None:
    tree = Sysroot(build(replace(STAGES["wsl2"], files={"/usr/lib/wsl/lib/libd3d12.so": ""}), tmp_path))
    with pytest.raises(MachineError, match=r"no /opt/rocm/lib/librocdxg.so.1"):
        planned(recipe, tree, "gfx1201", DOCKER)
    states = {check.code: finding.state for check, finding in examine(gather(tree, Path("/")))}
    assert states["RS118"] is State.FAIL


def test_selinux_that_enforces_keeps_your_folders_labels(tmp_path: Path) -> None:
    build(replace(STAGES["r9700"], files={"/sys/fs/selinux/enforce": "1"}), tmp_path)
    tree = Sysroot(tmp_path)
    machine = probe(tree)
    assert container_access(machine, machine.gpus, replace(DOCKER, selinux=True), tree).security[-1] == "label=disable"
    assert container_access(machine, machine.gpus, DOCKER, tree).security == ("no-new-privileges",)


CARDS = st.builds(
    lambda card, bus, minor: replace(card, bus=bus, minor=minor),
    st.sampled_from(
        [
            R9700,
            RX7900XTX,
            RX9060XT,
            RAPHAEL,
            STRIX_HALO,
            replace(R9700, driver=""),
            *cpx(STAGES["mi300x-spx"].cards[0])[:3],
        ]
    ),
    st.integers(1, 200),
    st.sampled_from([*range(128, 140), 0, 5, 400]),
)
ASKED = st.sampled_from([None, "all", "0", "0,1", "1,2", "gfx1201", "gfx942", ">=16GiB", "7"])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(CARDS, max_size=5), ASKED, st.sampled_from(sorted(ENGINES)), st.booleans())
def test_any_mixture_of_cards_gives_a_plan_of_the_chosen_devices_or_a_named_refusal(
    tmp_path_factory: pytest.TempPathFactory, cards: list[Card], asked: str | None, engine: str, usable: bool
) -> None:
    assume(len({card.minor for card in cards}) == len(cards))
    tree = Sysroot(build(Stage(tuple(cards), usable=usable), tmp_path_factory.mktemp("mixture")))
    machine: Machine = probe(tree)
    try:
        chosen: Selection = select(machine.gpus, asked, least=1, most=4)
        access = container_access(machine, chosen.gpus, ENGINES[engine], tree)
    except (MachineError, UsageError) as error:
        assert error.what and len(str(error)) > 15
        return
    assert set(access.devices) == {"/dev/kfd"} | {gpu.render_node for gpu in chosen.gpus}
    assert all(gpu.render_node for gpu in chosen.gpus) and len({gpu.gfx for gpu in chosen.gpus}) == 1
    if usable:
        env, unset = local_env(machine, chosen.gpus)
        there = [gpu for gpu in machine.gpus if gpu.render_node in machine.nodes]
        assert [there[int(number)] for number in env[0][1].split(",")] == list(chosen.gpus)
        assert "HIP_VISIBLE_DEVICES" in unset
    else:
        with pytest.raises(MachineError, match="is not yours to open"):
            local_env(machine, chosen.gpus)
    by_hand = asked and all(part.isdigit() for part in asked.split(","))
    assert by_hand or not any(g.integrated for g in chosen.gpus) or all(g.integrated for g in machine.gpus)


FUZZ_SECONDS = float(os.environ.get("RADEON_STACK_FUZZ_SECONDS", "5"))


FUZZED = ("two-r9700-and-igpu", "mi300x-cpx", "strix-halo", "wsl2")


def test_random_bytes_in_any_file_of_sysfs_never_crash_it(tmp_path: Path) -> None:
    """For some seconds here, for half a minute in CI (RADEON_STACK_FUZZ_SECONDS); the seed is told when it fails."""
    seed = int(os.environ.get("RADEON_STACK_FUZZ_SEED", time.time_ns()))
    chance = random.Random(seed)
    more = {
        "/etc/cdi/amd.json": CDI,
        "/sys/module/amdgpu/version": "1",
        "/sys/bus/pci/devices/0000:05:00.0/pp_dpm_sclk": "0: 41Mhz *\n1: 2350Mhz\n",
        "/sys/bus/pci/devices/0000:05:00.0/gpu_busy_percent": "99\n",
    }
    whole: dict[str, dict[Path, bytes]] = {}
    for name in FUZZED:
        root = build(replace(STAGES[name], files=more), tmp_path / name)
        files = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
        whole[name] = {path: path.read_bytes() for path in files}
    ends, rounds = time.monotonic() + FUZZ_SECONDS, 0
    while time.monotonic() < ends or rounds < 20:
        rounds += 1
        name = chance.choice(FUZZED)
        hit = chance.sample(sorted(whole[name]), chance.randint(1, 3))
        for path in hit:
            path.write_bytes(spoiled(whole[name][path], chance))
        try:
            look_at(Sysroot(tmp_path / name))
        except (MachineError, UsageError):
            pass
        except Exception as error:  # pragma: no cover - what the test is for
            raise AssertionError(f"seed {seed}: {hit}") from error
        for path in hit:
            path.write_bytes(whole[name][path])
    assert rounds >= 20


def look_at(tree: Sysroot) -> None:
    """All that is read of a machine, in this process: a probe's child would keep its crash to itself."""
    facts = Facts(**from_files(tree), clocks=clocks(tree), needs=needs())
    examine(facts)
    pack(facts, tree, tree.root.parent / "facts.tar.gz")
    chosen = select(facts.machine.gpus, None, least=0, most=8)
    container_access(facts.machine, chosen.gpus, DOCKER, tree)


def spoiled(data: bytes, chance: random.Random) -> bytes:
    kind = chance.randint(0, 5)
    if kind == 0:
        return chance.randbytes(chance.randint(0, 300))
    if kind == 1:
        return data[: chance.randint(0, len(data))]
    if kind == 2:
        return b"".join(
            b"%s %d\n" % (line.split(b" ")[0], chance.choice([0, -1, 1, 2**31, 2**64, 10**30]))
            for line in data.splitlines()
        )
    if kind == 3:
        return data * chance.randint(2, 50)
    if kind == 4:
        return b"9" * chance.randint(1, 5000) + b"\n"
    at = chance.randint(0, max(0, len(data) - 1))
    return data[:at] + chance.randbytes(4) + data[at:]


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    began = time.monotonic()
    assert Sysroot(tmp_path).read("/pipe").problem == "unreadable"
    assert time.monotonic() - began < 1


def test_a_link_that_leads_out_of_a_staged_tree_is_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the machine that diagnoses")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "link").symlink_to(secret)
    (tree / "up").symlink_to("../secret")
    assert Sysroot(tree).read("/link").problem == Sysroot(tree).read("/up").problem == "unreadable"
    assert Sysroot(tree).read("/../secret").problem == "unreadable"


def test_a_file_without_an_end_is_read_to_its_limit(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"x" * (LIMIT * 3))
    assert len(Sysroot(tmp_path).read("/long").text) == LIMIT


def test_a_gpu_is_told_by_all_that_the_kernel_knows_of_it(trees: dict[str, Sysroot]) -> None:
    gpu: Gpu = topology(trees["mi300x-spx"]).gpus[0]
    assert (gpu.compute_units, gpu.numa_node, gpu.pci_id) == (304, 0, "1002:74a1")
    assert gpu.unique_id == f"GPU-{16404946649897475633:016x}" and gpu.links[0].kind == "pcie" and gpu.links[0].to == 0


def test_gpus_are_listed_with_their_numbers_and_their_state(cli: Cli, trees: dict[str, Sysroot]) -> None:
    told = cli("gpus", "--sysroot", trees["two-r9700-and-igpu"].root, env={**os.environ, "COLUMNS": "200"})
    assert told.code == Exit.OK and [line.split()[0] for line in told.out.splitlines()] == ["gpu", "0", "1", "2"]
    assert "Radeon AI PRO R9700" in told.out and "integrated" in told.out
    listed = cli("gpus", "--sysroot", trees["mi300x-cpx"].root, "--json").json["gpus"]
    assert [gpu["partition"] for gpu in listed] == list(range(8)) and listed[0]["state"] == "free"
    none = cli("gpus", "--sysroot", trees["no-driver"].root)
    assert none.code == Exit.OK and "radeon-stack doctor" in none.error
