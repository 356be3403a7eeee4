"""Do GPU, driver, ROCm and image go together, and is there room to run?"""

from __future__ import annotations

from radeon_stack.catalog.platforms import load_platforms
from radeon_stack.catalog.sizes import format_size
from radeon_stack.catalog.versions import version
from radeon_stack.host.checks.finding import Check, Finding, fail, ok, skipped, warn
from radeon_stack.host.facts import Facts, ImageFact

NO_CARD = "no GPU that ROCm sees"
SHOWN = 3
LEAST_HOME = 20 << 30  # an adapter, checkpoints and a merged 8B model in 16 bit


def driver_fits(facts: Facts) -> Finding:
    """The driver against the ROCm of the images here, else of the default release.

    AMD tests pairs within a year of each other. Linux' own driver has no version of its own.
    """
    if not facts.machine.gpus:
        return skipped(NO_CARD)
    driver = facts.machine.driver
    if driver is None:
        return ok("the kernel's own driver tells no version; AMD supports user space of a year around it")
    mine = _fitting(facts)
    wanted = mine[0].drivers if mine and mine[0].drivers else _drivers(_release(facts))
    rocm = mine[0].rocm if mine else _release(facts)
    if not wanted:
        return skipped(f"which drivers ROCm {rocm} was made for is not known")
    if any(_begins(driver, name) for name in wanted):
        return ok(f"{driver}; ROCm {rocm} was made for {', '.join(wanted)}")
    return warn(f"driver {driver}; ROCm {rocm} was made for {', '.join(wanted)}: a year around it may work")


def gfx_supported(facts: Facts) -> Finding:
    """Is there a release of ROCm with code for this gfx, and is it the default one?"""
    if not facts.machine.gpus:
        return skipped(NO_CARD)
    known = load_platforms()
    cards = [gpu.gfx for gpu in facts.machine.gpus if not gpu.integrated]
    if not cards:
        names = ", ".join(sorted({gpu.gfx for gpu in facts.machine.gpus}))
        return skipped(f"only an integrated GPU ({names}): presets for the CPU work, --preset demo")
    said, without = [], []
    for gfx in dict.fromkeys(cards):
        having = [platform for platform in known.values() if platform.gfx == gfx]
        release = known.release_for(gfx)
        here = next((platform for platform in having if platform.rocm == release), None)
        if not having:
            without.append(gfx)
        elif here is None:
            said.append(f"{gfx}: not in ROCm {release}, in {', '.join(str(p.rocm) for p in having)}")
        else:
            said.append(f"{gfx}: ROCm {here.rocm}{'' if here.official else ', built, and in no matrix of AMD'}")
    said += [f"{gfx}: in no release of ROCm that we know" for gfx in without]
    if len(without) == len(set(cards)):
        return fail("; ".join(said), "radeon-stack image list")
    return warn("; ".join(said)) if without or "not in ROCm" in "; ".join(said) else ok("; ".join(said))


def image_here(facts: Facts) -> Finding:
    """Has the engine an image to train in, for the GPU of this machine (or for the CPU)?"""
    if facts.images is None:
        return skipped("no engine answers (RS201)")
    known = load_platforms()
    supported = {platform.gfx for platform in known.values()}
    cards = [gpu for gpu in facts.machine.gpus if not gpu.integrated and gpu.gfx in supported]
    if facts.machine.wsl:
        return skipped("WSL2 does not tell which GPU it is: --gpus gfx1201 chooses image and card")
    if facts.machine.topology.pci and not facts.machine.gpus:
        return skipped("the GPU has to be seen first (RS102, RS104)")
    mine = _fitting(facts)
    if mine:
        named = list(dict.fromkeys(image.name for image in mine))
        return ok(", ".join(named[:SHOWN]) + (f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""))
    arch = cards[0].gfx if cards else "cpu"
    rocm = "" if arch == "cpu" else f"ROCM={known.release_for(arch)} "
    if arch == "cpu" and facts.packages_missing == ():
        return ok("none for the CPU yet; --engine local works without one (make image ARCH=cpu builds one)")
    if facts.engine is not None and facts.engine.product == "podman":
        name = arch if arch == "cpu" else f"rocm{known.release_for(arch)}-{arch}"
        return warn(
            f"the engine has no train image for {arch}",
            f"radeon-stack image render --arch {arch} -o ./context",
            f"podman build --tag radeon-stack/train:{name} ./context",
        )
    return warn(f"the engine has no train image for {arch}", f"make image {rocm}ARCH={arch}")


def image_fits(facts: Facts) -> Finding:
    """Images for other GPUs than this machine's are a mistake that shows late: invalid device function."""
    ours = [image for image in facts.images or () if image.gfx]
    present = {gpu.gfx for gpu in facts.machine.gpus}
    if not ours or not present:
        return skipped("no image for a GPU here" if not ours else NO_CARD)
    foreign = [image for image in ours if image.gfx not in present]
    if len(foreign) == len(ours):
        return warn(f"{foreign[0].name} has code for {foreign[0].gfx}; here is {', '.join(sorted(present))}")
    return ok(f"{len(ours) - len(foreign)} of {len(ours)} images are for this machine's GPUs")


def memory(facts: Facts) -> Finding:
    """Is there as much memory as recipes ask for? Merging holds the 16-bit model in the host's memory once."""
    found = facts.machine.memory
    gpus = sum(not gpu.problem for gpu in facts.machine.gpus)
    possible = [need for need in facts.needs if need.gpus <= gpus] or list(facts.needs)
    if not found or not possible:
        return skipped("not known")
    small = [need for need in possible if need.memory > found]
    if small:
        lower = f"radeon-stack run {small[0].recipe} --set resources.memory={found * 9 // 10 >> 30}GiB"
        return warn(f"{format_size(found)}; {small[0].recipe} asks for {format_size(small[0].memory)}", lower)
    asked = ", ".join(f"{need.recipe} ({format_size(need.memory)})" for need in possible)
    return ok(f"{format_size(found)}, enough for {asked}")


def shm(facts: Facts) -> Finding:
    """The machine's /dev/shm, which only runs without a container use.

    A container has its own, of the recipe's size.
    """
    if facts.shm is None:
        return skipped("not known; containers are given their own")
    small = [need for need in facts.needs if need.shm > facts.shm]
    if small:
        asked = f"{small[0].recipe} asks for {format_size(small[0].shm)}"
        return ok(f"{format_size(facts.shm)}; {asked}, which a container is given and --engine local is not")
    return ok(format_size(facts.shm))


def home(facts: Facts) -> Finding:
    """Is there room for runs? Checkpoints, adapters and merged models are kept below RADEON_STACK_HOME."""
    if facts.home_free is None:
        return skipped("not known")
    if facts.home_free < LEAST_HOME:
        return warn(
            f"{format_size(facts.home_free)} free for runs; a merged 8B model is 15 GiB", "radeon-stack runs list"
        )
    return ok(f"{format_size(facts.home_free)} free for runs")


def local(facts: Facts) -> Finding:
    """Are the packages here that `--engine local` imports? Containers bring their own."""
    if facts.packages_missing is None:
        return skipped("not known")
    if facts.packages_missing:
        return skipped(
            f"--engine local lacks {', '.join(facts.packages_missing)} in this Python; containers do not need them"
        )
    return ok("this Python has all that --engine local needs")


def _fitting(facts: Facts) -> list[ImageFact]:
    """Train images for the cards here; without a card, for the CPU."""
    cards = {gpu.gfx for gpu in facts.machine.gpus if not gpu.integrated}
    return [
        image
        for image in facts.images or ()
        if image.kind == "train" and (image.gfx in cards if cards else not image.gfx)
    ]


def _release(facts: Facts) -> str:
    """The release that this machine's first card would get."""
    return load_platforms().release_for(facts.machine.gpus[0].gfx)


def _drivers(rocm: str) -> tuple[str, ...]:
    return next((p.drivers for p in load_platforms().values() if p.rocm == rocm), ())


def _begins(driver: str, name: str) -> bool:
    found, wanted = version(driver), version(name)
    count = name.count(".") + 1
    return found is not None and wanted is not None and found[:count] == wanted[:count]


CHECKS = (
    Check("RS103", "driver and ROCm", driver_fits),
    Check("RS110", "gfx and ROCm", gfx_supported),
    Check("RS301", "memory", memory),
    Check("RS302", "shared memory", shm),
    Check("RS303", "room for runs", home),
    Check("RS304", "this Python", local),
    Check("RS401", "image for this machine", image_here),
    Check("RS402", "image and GPU", image_fits),
)
