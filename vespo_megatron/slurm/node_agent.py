"""The trainer processes of one node, each a `vespo-megatron train`, in the environment they have wherever they start.

`python -m vespo_megatron.slurm.node_agent HEAD:PORT RECIPE OVERRIDES…`, on every node, under srun. OpenMP and CUDA read
their variables when a process starts, so they are set here. Rank 0 listens at HEAD:PORT and nowhere else, for the
ranks to meet; HEAD is an address of the node that SLURM counts as the first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vespo_megatron.launch.agent import rank_variables, run_ranks
from vespo_megatron.launch.launcher import agent_environment
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.processes import Stopped, stop_on_signals


def ranks(recipe: Recipe, endpoint: str, node: int) -> list[dict[str, str]]:
    """The variables of each rank on this node of the recipe's cluster."""
    address, _, port = endpoint.rpartition(":")
    meeting = {"MASTER_ADDR": address.strip("[]"), "MASTER_PORT": port}
    cluster = recipe.cluster
    return [
        meeting | rank_variables(rank, cluster.gpus_per_node, node, cluster.num_nodes)
        for rank in range(cluster.gpus_per_node)
    ]


def main(endpoint: str, recipe_file: str, overrides: Sequence[str]) -> int:
    """Run them; 0 when each ended well."""
    recipe = load_recipe(recipe_file, overrides)
    os.environ.update(agent_environment(recipe, os.environ))
    command = ["vespo_megatron.cli", "train", recipe_file, *overrides]
    try:
        with stop_on_signals():
            return bool(run_ranks(ranks(recipe, endpoint, int(os.environ["SLURM_NODEID"])), command))
    except Stopped as stopped:
        return stopped.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
