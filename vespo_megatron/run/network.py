"""What gloo and NCCL are told of the network."""

from __future__ import annotations

from vespo_megatron.recipe.schema import Recipe


def interface_variables(recipe: Recipe) -> dict[str, str]:
    """The interface that a recipe names, for every process of its run; nothing where it names none."""
    name = recipe.cluster.network_interface
    return {} if name is None else {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
