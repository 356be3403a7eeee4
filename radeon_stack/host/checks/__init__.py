"""What doctor asks, in its order. A new check is a function and a line in one of these lists."""

from __future__ import annotations

from radeon_stack.catalog.versions import within
from radeon_stack.host.checks import engine, gpu, images, settings
from radeon_stack.host.checks.finding import Check, Finding, State, ok, skipped, warn
from radeon_stack.host.facts import Facts
from radeon_stack.host.known_issues import Issue, Setup, met_by

CHECKS: tuple[Check[Facts], ...] = tuple(
    sorted((check for room in (gpu, settings, engine, images) for check in room.CHECKS), key=lambda check: check.code)
)


def examine(facts: Facts) -> list[tuple[Check[Facts], Finding]]:
    """Every check with what it finds, then the known issues that this machine can meet."""
    unread = "files" in facts.late or "files" in facts.broken
    late = skipped("the files of the kernel do not answer (RS100)")
    found = [(check, late if unread and "RS100" < check.code < "RS2" else check.evaluate(facts)) for check in CHECKS]
    setup = setup_of(facts)
    return found + [(Check(issue.id, issue.title, lambda _: ok("")), _issue(issue, setup)) for issue in met_by(setup)]


def setup_of(facts: Facts) -> Setup:
    """What known issues are looked up for: the cards here and, when all images agree, their ROCm."""
    cards = [gpu for gpu in facts.machine.gpus if not gpu.integrated]
    gfx = frozenset(gpu.gfx for gpu in cards)
    releases = {image.rocm for image in facts.images or () if image.gfx in gfx}
    return Setup(
        gfx=gfx,
        gpus=len(cards),
        rocm=min(releases) if len(releases) == 1 else "",
        kernel=facts.machine.kernel,
        integrated=len(cards) < len(facts.machine.gpus),
    )


def _issue(issue: Issue, setup: Setup) -> Finding:
    """What is handled is fine; what a person could change (a version) is worth a warning."""
    source = f"{issue.links[0]}, read {issue.checked}"
    if issue.env:
        return ok(f"runs set {' '.join(f'{k}={v}' for k, v in issue.env.items())} ({source})")
    if issue.handled:
        return ok(f"{issue.handled} ({source})")
    told = [(issue.rocm, setup.rocm), (issue.kernel, setup.kernel)]
    changeable = any(wanted and within(wanted, found) for wanted, found in told)
    said = f"{issue.consequence}. {issue.setting or issue.fixed_in} ({source})"
    return warn(said) if changeable else ok(said)


__all__ = ["CHECKS", "Check", "Finding", "State", "examine", "setup_of"]
