"""What gloo and NCCL are told of the network."""

from __future__ import annotations

import ipaddress

from vespo_megatron.recipe.schema import Recipe

_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
LOOPBACK_VARIABLES = dict.fromkeys(_VARIABLES, "lo")
"""For a run on one machine: neither listens beyond it, nor looks up a name that has no address in many containers."""


def interface_variables(recipe: Recipe) -> dict[str, str]:
    """The interface that a recipe names, for every process of its run; nothing where it names none."""
    name = recipe.cluster.network_interface
    return {} if name is None else dict.fromkeys(_VARIABLES, name)


def is_loopback(host: str) -> bool:
    """Whether this name or address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
