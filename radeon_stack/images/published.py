"""Which published image fits this machine? Chosen by labels, with a reason for each that was turned down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from radeon_stack.catalog.platforms import load_platforms
from radeon_stack.errors import ImageError, StackError, UsageError
from radeon_stack.images.labels import DRIVERS, GFX, KEY, KIND, PLATFORM, ROCM
from radeon_stack.images.references import repository
from radeon_stack.images.registry import Manifest, Registry

STABLE = "stable"
SBOM_TYPE = "application/vnd.cyclonedx+json"


@dataclass(frozen=True)
class Wanted:
    """What is looked for: `gfx` is `cpu` without a GPU, `driver` None where it tells no version."""

    kind: str
    gfx: str
    driver: str | None = None
    rocm: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A published image and its labels."""

    tag: str
    manifest: Manifest
    labels: dict[str, str]
    diff_ids: tuple[str, ...] = ()
    created: str = ""

    @property
    def config_digest(self) -> str:
        return str(self.manifest.content["config"]["digest"])


@dataclass(frozen=True)
class Choice:
    """The image taken, why, and why each other one was not."""

    candidate: Candidate
    why: str
    turned_down: tuple[tuple[str, str], ...]


def candidate(registry: Registry, reference: str) -> Candidate | None:
    """The image of a tag or digest; None when there is none, or it is no image."""
    manifest = registry.manifest(reference)
    if manifest is None or "config" not in manifest.content:
        return None
    config = registry.config(manifest)
    labels = (config.get("config") or {}).get("Labels") or {}
    diff_ids = (config.get("rootfs") or {}).get("diff_ids") or ()
    return Candidate(
        reference,
        manifest,
        {str(name): str(value) for name, value in labels.items()},
        tuple(str(one) for one in diff_ids),
        str(config.get("created", "")),
    )


def in_channel(registry: Registry, channel: str = STABLE) -> list[Candidate]:
    """All images that a channel points to."""
    tags = [tag for tag in registry.tags() if tag.endswith(f"-{channel}")]
    return [found for tag in sorted(tags) if (found := candidate(registry, tag)) is not None]


def first_fitting(
    registries: Iterable[str],
    wanted: Wanted,
    channel: str = STABLE,
    told: Callable[[str], None] = lambda line: None,
) -> tuple[Registry, Choice]:
    """The choice of the first of these registries that has one; `told` hears why those before have none.

    UsageError when there is no registry, ImageError when no image fits.
    """
    names = [name for value in registries for name in value.split()]
    if not names:
        raise UsageError(
            "no registry is set, and none is known to hold images",
            where="--registry",
            remedy="RADEON_STACK_REGISTRY=HOST/NAME, or build it: make image ROCM=7.1.1 ARCH=gfx1201",
        )
    releases = list(dict.fromkeys(platform.rocm or "" for platform in load_platforms().values()))
    for name in names:
        registry = Registry(repository(name))
        try:
            return registry, choose(in_channel(registry, channel), wanted, releases)
        except ImageError as error:
            last: StackError = error
            told(f"{name}: {error}")
    raise ImageError(str(last), remedy="another source: --registry, or build it here: --or-build")


def choose(candidates: Iterable[Candidate], wanted: Wanted, releases: Sequence[str]) -> Choice:
    """The fitting image of the newest release (`releases` in their order), one made for this driver before others.

    ImageError lists what was turned down. A driver that an image was not made for is no reason to refuse it: AMD
    supports user space and driver up to a year apart (compatibility matrix of ROCm, since 6.4).
    """
    fitting: list[Candidate] = []
    turned_down: list[tuple[str, str]] = []
    for one in candidates:
        why_not = unfit(one, wanted)
        if why_not:
            turned_down.append((one.tag, why_not))
        else:
            fitting.append(one)
    if not fitting:
        seen = "; ".join(f"{tag}: {why}" for tag, why in turned_down) or "it has no image in this channel"
        raise ImageError(f"no published {wanted.kind} image fits {wanted.gfx}: {seen}")
    order = {release: place for place, release in enumerate(releases)}
    best = max(
        fitting,
        key=lambda one: (_compared(one, wanted) is not False, order.get(one.labels.get(ROCM, ""), -1), one.created),
    )
    foreign = f"it was not made for driver {wanted.driver}"
    turned_down += [
        (one.tag, foreign if _compared(one, wanted) is False else f"{best.tag} is newer")
        for one in fitting
        if one is not best
    ]
    return Choice(best, reason(best, wanted), tuple(turned_down))


def unfit(one: Candidate, wanted: Wanted) -> str:
    """Why an image does not fit, or nothing."""
    labels = one.labels
    if KEY not in labels:
        return "it is not one of ours: no key"
    if labels.get(KIND) != wanted.kind:
        return f"it is for {labels.get(KIND)}"
    made_for = labels.get(GFX) or labels.get(PLATFORM, "")
    if made_for != wanted.gfx:
        return f"it is for {made_for}"
    if wanted.rocm and labels.get(ROCM) != wanted.rocm:
        return f"it has ROCm {labels.get(ROCM)}"
    return ""


def reason(one: Candidate, wanted: Wanted) -> str:
    """Why it was taken."""
    if wanted.gfx == "cpu":
        return f"{wanted.kind}, for a machine without a GPU"
    drivers = one.labels.get(DRIVERS)
    fits = {
        True: f"driver {wanted.driver} is among {drivers}",
        False: f"it was made for {drivers}; driver {wanted.driver} works when it is within a year of them",
        None: "its driver was not compared: "
        + ("the kernel's own tells no version" if drivers else "none is on record"),
    }[_compared(one, wanted)]
    return f"{wanted.kind} for {wanted.gfx} with ROCm {one.labels.get(ROCM)}; {fits}"


def _compared(one: Candidate, wanted: Wanted) -> bool | None:
    """Was it made for this driver? None where the one or the other is not known."""
    drivers = [driver for driver in one.labels.get(DRIVERS, "").split(",") if driver]
    if not wanted.driver or not drivers:
        return None
    return any(wanted.driver == driver or wanted.driver.startswith(f"{driver}.") for driver in drivers)
