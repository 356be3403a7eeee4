"""How long a training step takes over N nodes with one card each: arithmetic on bytes and seconds, nothing measured.

**Collectives**, as rings, by NCCL-tests' doc/PERFORMANCE.md: of n members with B bytes a second to the outside each, S
bytes are all-reduced in S/B · 2(n−1)/n, and all-gathered (S being the whole) in S/B · (n−1)/n. Each of a ring's steps,
2(n−1) and n−1 of them, waits for one hop besides. NCCL has trees too, which hop less: this is the slower way.

**Data parallelism** all-reduces the adapters' gradients once a step, while the last pass goes back (PyTorch
Distributed, arXiv 2006.15704, section 3.2): what is longer than that is waited for, and always the last bucket.

**Sharded** (FSDP2; PyTorch FSDP, arXiv 2304.11277, section 4) gathers each layer's packed bytes twice a pass, forward
and back, the next while one computes; the first of each way is waited for. The gradients come besides, in what of the
way back the gathers leave.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Parallel = Literal["data", "sharded"]

NODES = (1, 2, 4, 8, 16, 32, 64)
BACKWARD = 2 / 3  # of a pass's time: two products of a layer's size where the way forward has one
BUCKET = 25 << 20  # bytes: DistributedDataParallel's `bucket_cap_mb`
PAYS = 0.5  # the least share of its time that a card has to work


@dataclass(frozen=True)
class Network:
    """One node's link: `gbit` a second each way, the share of it that a collective gets, and seconds a hop."""

    gbit: float
    share: float = 0.8
    hop: float = 30e-6

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.gbit * 1e9 / 8 * self.share


@dataclass(frozen=True)
class Load:
    """What a model has sent: bytes of the gradients, and of one of its layers, packed and whole."""

    gradients: int
    layers: int
    layer: int


@dataclass(frozen=True)
class Step:
    """One card's part of a step: so many passes, forward and back, of so many seconds where nothing is sent."""

    passes: int
    pass_seconds: float


def all_reduce(nbytes: int, nodes: int, network: Network) -> float:
    """Seconds until each node has the sum of all nodes' `nbytes`."""
    return nbytes / network.rate * 2 * (nodes - 1) / nodes + 2 * (nodes - 1) * network.hop


def all_gather(nbytes: int, nodes: int, network: Network) -> float:
    """Seconds until each node has all `nbytes`, of which it had its share."""
    return nbytes / network.rate * (nodes - 1) / nodes + (nodes - 1) * network.hop


def step_seconds(load: Load, parallel: Parallel, step: Step, nodes: int, network: Network) -> float:
    """Seconds of a step: computing, and what of the sending is not hidden behind it."""
    backward = BACKWARD * step.pass_seconds
    gather = all_gather(load.layer, nodes, network) if parallel == "sharded" else 0.0
    ways = (step.pass_seconds - backward, backward)
    passes = step.passes * sum(gathered_ahead(way, load.layers, gather) for way in ways)
    hidden = max(backward - load.layers * gather, 0.0)
    last = all_reduce(min(load.gradients, BUCKET), nodes, network)
    return passes + max(all_reduce(load.gradients, nodes, network) - hidden, last)


def gathered_ahead(compute: float, layers: int, gather: float) -> float:
    """Seconds of one way through all layers, where one is gathered while the one before it computes."""
    return gather + (layers - 1) * max(compute / layers, gather) + compute / layers


def weak(load: Load, parallel: Parallel, step: Step, network: Network) -> dict[int, float]:
    """By nodes, the share of its time that a card works, where each has the same work however many there are."""
    alone = step.passes * step.pass_seconds
    return {nodes: alone / step_seconds(load, parallel, step, nodes, network) for nodes in NODES}


def strong(load: Load, parallel: Parallel, step: Step, network: Network) -> dict[int, float]:
    """By nodes, how many times faster than one a step is whose passes are shared out: `step` is all of it."""
    alone = step.passes * step.pass_seconds
    shares = {nodes: Step(step.passes // nodes, step.pass_seconds) for nodes in NODES}
    return {nodes: alone / step_seconds(load, parallel, share, nodes, network) for nodes, share in shares.items()}


def pays(efficiency: Mapping[int, float]) -> int:
    """The most nodes with which each card still works for at least `PAYS` of its time."""
    enough = 1
    for nodes, share in sorted(efficiency.items()):
        if share < PAYS:
            break
        enough = nodes
    return enough
