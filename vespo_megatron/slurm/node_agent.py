"""torchrun on one trainer node, in the environment that a trainer process has wherever it is started.

`python -m vespo_megatron.slurm.node_agent HEAD:PORT ID RECIPE OVERRIDES…`. OpenMP and CUDA read their variables when a
process starts, so they are set here, before torchrun starts any.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vespo_megatron.launch.launcher import agent_environment
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.recipe.schema import Recipe


def torchrun(recipe: Recipe, endpoint: str, name: str, arguments: Sequence[str]) -> list[str]:
    """Its command line: `arguments` are of `vespo-megatron train`."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={recipe.cluster.num_nodes}",
        f"--nproc-per-node={recipe.cluster.gpus_per_node}",
        "--max-restarts=0",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={name}",
        "-m",
        "vespo_megatron.cli",
        "train",
        *arguments,
    ]


def main(endpoint: str, name: str, recipe_file: str, *overrides: str) -> None:
    """Become torchrun."""
    recipe = load_recipe(recipe_file, overrides)
    command = torchrun(recipe, endpoint, name, [recipe_file, *overrides])
    os.execve(command[0], command, agent_environment(recipe, os.environ))


if __name__ == "__main__":
    main(*sys.argv[1:])
