"""Which backend `tp_backend="auto"` stands for.

Invariant: the answer depends on the model's devices and on what the driver says of them, never on
the load of the machine. It is made once, in the main process, before any process is spawned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import peerlane

MAX_RANKS = 16
OLDEST = (7, 5)


@dataclass(frozen=True)
class Choice:
    """A backend's name, and why it is the one."""

    backend: str
    reason: str


def choose(devices: Sequence[int], topology: Mapping[str, Any] | None = None) -> Choice:
    """Chooses for the GPUs `devices`.

    `p2p` if Peerlane can use all of them. If not, `nccl` where NVLink joins every pair, else
    `native`, which ExLlamaV3 recommends for PCIe.
    """
    if topology is None:
        try:
            topology = peerlane.topology()
        except peerlane.Error as error:
            return Choice("native", f"no topology: {error}")
    named = _named(devices)
    nodes = {node["ordinal"]: position for position, node in enumerate(topology["nodes"])}
    if missing := [device for device in devices if device not in nodes]:
        return Choice("native", f"{_named(missing)} not in the topology, which has {_named(nodes)}")
    places = {nodes[device]: device for device in devices}
    links = {(link["from"], link["to"]): link for link in topology["links"]}
    pairs = [links[pair] for pair in permutations(places, 2)]
    nvlink = all(link["nvlinks"] for link in pairs)

    obstacle = _obstacle(places, topology["nodes"], pairs)
    if obstacle is None:
        way = (
            "NVLink"
            if nvlink
            else "PCIe"
            if not any(link["nvlinks"] for link in pairs)
            else "NVLink and PCIe"
        )
        over = f", over {way}" if pairs else ""
        return Choice("p2p", f"{named}: every GPU can map every other's memory{over}")
    if pairs and nvlink:
        if (why_not := _nccl_obstacle()) is None:
            return Choice("nccl", f"{named}: {obstacle}, but NVLink joins every pair")
        return Choice("native", f"{named}: {obstacle}; NVLink joins every pair, but {why_not}")
    return Choice("native", f"{named}: {obstacle}")


def _obstacle(
    places: Mapping[int, int],
    nodes: Sequence[Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
) -> str | None:
    """What keeps Peerlane from using these GPUs, if anything."""
    if len(places) > MAX_RANKS:
        return f"{len(places)} GPUs are more than the {MAX_RANKS} that p2p can join"
    for place, device in places.items():
        capability = tuple(nodes[place]["compute_capability"])
        if capability < OLDEST:
            return "GPU {} has compute capability {}.{}, below {}.{}".format(
                device, *capability, *OLDEST
            )
    for link in pairs:
        if not link["access"]:
            return f"GPU {places[link['from']]} cannot map the memory of GPU {places[link['to']]}"
    return None


def _nccl_obstacle() -> str | None:
    """What keeps ExLlamaV3 from starting NCCL in this process, if anything."""
    try:
        import torch.distributed as distributed
    except ImportError:
        return "torch is not installed"
    if not (distributed.is_available() and distributed.is_nccl_available()):
        return "this torch has no NCCL"
    # ExLlamaV3 makes NCCL's group torch's default group, of which a process has one.
    if distributed.is_initialized():
        return "this process already has a torch process group"
    return None


def _named(devices: Sequence[int] | Mapping[int, Any]) -> str:
    listed = ", ".join(str(device) for device in sorted(devices))
    return f"GPU {listed}" if len(devices) == 1 else f"GPUs {listed or 'none'}"
