"""Batch scripts from a recipe: what runs where, and every end of it."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import Recipe
from vespo_megatron.run.processes import EXIT_RESUMABLE
from vespo_megatron.run.run_directory import READY_FILE
from vespo_megatron.run.stopping import STOP_FILE, STOPPED_FILE

FIRST_PORT, PORT_STEP = 31000, 100
"""Servers of the i-th rollout node listen from 31000 + 100·i on (virtual nodes share one machine's ports)."""
GRACE_S = 30
"""What the scripts ask to stop has so long before it is killed."""
LAYOUTS = ("colocated", "disaggregated", "heterogeneous")


def job_script(recipe: Recipe, recipe_file: str | Path, overrides: Sequence[str] = ()) -> str:
    """The batch script of one run.

    Args:
        recipe: the recipe with its overrides, as it will run.
        recipe_file: the file the job reads it from, reached from every node.
        overrides: what the job's commands add to the file.

    Raises:
        UserError: a layout that is none, or that has no rollout nodes where it needs some.
    """
    config = recipe.slurm
    _check(recipe)
    overrides = [*overrides, *_of_layout(recipe)]
    colocated = config.layout == "colocated"
    heterogeneous = config.layout == "heterogeneous"
    return _render(
        "job.sbatch.j2",
        recipe,
        job_name=_job_name(recipe.exp_manager.name),
        recipe_file=str(Path(recipe_file).resolve()),
        overrides=list(overrides),
        trainer_nodes=recipe.cluster.num_nodes,
        rollout_nodes=0 if colocated else config.rollout_nodes,
        heterogeneous=heterogeneous,
        servers_per_node=recipe.policy.generation.sglang_cfg.num_servers,
        startup_timeout=recipe.policy.generation.sglang_cfg.startup_timeout,
        head_options=[
            *_options(recipe),
            f"--signal=B:USR1@{config.checkpoint_lead}",
            *(["--requeue"] if config.requeue else ["--no-requeue"]),
            "--open-mode=append",
            "--output=/dev/null",
        ],
        node_options=_node_options(recipe, config.partition),
        rollout_options=_node_options(recipe, config.rollout_partition or config.partition),
        port=recipe.policy.generation.sglang_cfg.port or FIRST_PORT,
        port_step=PORT_STEP,
        ready_file=READY_FILE,
        grace_s=GRACE_S,
        resumable=EXIT_RESUMABLE,
        runs=str(Path(recipe.exp_manager.exp_dir).resolve() / recipe.exp_manager.name),
        version='"$SLURM_JOB_ID"' if recipe.exp_manager.version is None else shlex.quote(recipe.exp_manager.version),
        stop_file=STOP_FILE,
        stopped_file=STOPPED_FILE,
        # A step that is not --exact has all that the job has of its nodes; bound to nothing, so do its threads.
        step="--overlap --cpu-bind=none --mem=0 --kill-on-bad-exit=1",
        own_servers=colocated and recipe.cluster.num_nodes == 1,
        trainer_container=" ".join(_container(recipe, config.container_image)),
        rollout_container=" ".join(_container(recipe, config.rollout_container_image or config.container_image)),
        trainer_group="--het-group=0" if heterogeneous else "",
        rollout_group="--het-group=1" if heterogeneous else "",
    )


def report_script(recipe: Recipe, name: str, arguments: str) -> str:
    """The batch script of what follows a comparison's runs: this command line of `vespo-megatron`."""
    options = [*_options(recipe), _directive("output", f"{Path(recipe.slurm.logs).resolve()}/report_%j.log", "logs")]
    return _render("report.sbatch.j2", recipe, head_options=options, job_name=_job_name(name), arguments=arguments)


def _render(template: str, recipe: Recipe, **names: Any) -> str:
    environment = Environment(
        loader=PackageLoader("vespo_megatron.slurm"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    inside = bool(recipe.slurm.container_image)
    python = "python3" if inside else shlex.quote(sys.executable)
    return environment.get_template(template).render(
        recipe=recipe,
        config=recipe.slurm,
        folder=str(Path.cwd()),
        logs=str(Path(recipe.slurm.logs).resolve()),
        host_python=shlex.quote(sys.executable),
        command=f"{python} -m vespo_megatron.cli",
        node_agent=f"{python} -m vespo_megatron.slurm.node_agent",
        **names,
    )


def _check(recipe: Recipe) -> None:
    config = recipe.slurm
    if config.layout not in LAYOUTS:
        raise UserError(f"is {config.layout!r}", where="slurm.layout", expected=f"one of {', '.join(LAYOUTS)}")
    if config.layout != "colocated" and config.rollout_nodes < 1:
        raise UserError(
            f"is {config.rollout_nodes}",
            where="slurm.rollout_nodes",
            expected=f"at least 1 in layout {config.layout}",
            fix="say how many nodes the SGLang servers get, or set slurm.layout=colocated",
        )
    transport, nodes = recipe.policy.generation.sglang_cfg.weight_transport, recipe.cluster.num_nodes
    reaches = {"disk"} | ({"tensor"} if nodes == 1 else set())
    if nodes == 1 and recipe.cluster.device == "cpu":
        reaches.add("distributed")
    if config.layout == "colocated" and transport not in reaches:
        raise UserError(
            f"is {transport} with slurm.layout=colocated on {nodes} nodes: memory is shared within a node, and NCCL "
            "takes no two processes on one GPU",
            where="policy.generation.sglang_cfg.weight_transport",
            expected="disk, with a weight_folder that all nodes share" + (", or tensor" if nodes == 1 else ""),
            fix="set it, or slurm.layout=disaggregated",
        )
    if recipe.policy.generation.backend != "sglang":
        raise UserError(
            f"is {recipe.policy.generation.backend}",
            where="policy.generation.backend",
            expected="sglang",
            fix="a run without servers needs no script of ours: torchrun under srun is enough",
        )


def _of_layout(recipe: Recipe) -> list[str]:
    """What a layout means for servers and trainer."""
    if recipe.slurm.layout != "colocated" or recipe.policy.generation.sglang_cfg.colocated:
        return []
    return ["policy.generation.sglang_cfg.colocated=true"]


def _options(recipe: Recipe) -> list[str]:
    config = recipe.slurm
    named = {"account": config.account, "qos": config.qos, "time": config.time}
    return [_directive(name, value, name) for name, value in named.items() if value]


def _directive(option: str, value: str, key: str) -> str:
    """What follows `#SBATCH`: a line that SLURM takes apart as a shell does, and that ends where the shell begins."""
    if _plain(value, key) and re.fullmatch(r"[\w.,:+=@%/-]+", value):
        return f"--{option}={value}"
    return f'--{option}="{value}"'


def _plain(value: str, key: str, refused: str = "\"'\\`$") -> bool:
    """True. Raises UserError for a value that could end the directive, or its quotes."""
    if not value.isprintable() or set(value) & set(refused):
        raise UserError(
            f"is {value!r}",
            where=f"slurm.{key}",
            expected="one line" + (" without quotes, \\, ` or $" if refused else ""),
        )
    return True


def _job_name(name: str) -> str:
    return re.sub(r"[^\w.+=@-]", "_", name, flags=re.ASCII)


def _node_options(recipe: Recipe, partition: str | None) -> list[str]:
    config = recipe.slurm
    options = [_directive("partition", partition, "partition")] if partition else []
    options.append("--exclusive" if config.cpus_per_node is None else f"--cpus-per-task={config.cpus_per_node}")
    if recipe.cluster.device != "cpu":
        options.append(f"--gpus-per-node={recipe.cluster.gpus_per_node}")
    return [*options, *(option for option in config.sbatch_options if _plain(option, "sbatch_options", refused=""))]


def _container(recipe: Recipe, image: str | None) -> list[str]:
    if not image:
        return []
    mounts = ",".join(recipe.slurm.container_mounts)
    return [
        f"--container-image={shlex.quote(image)}",
        *([f"--container-mounts={shlex.quote(mounts)}"] if mounts else []),
    ]
