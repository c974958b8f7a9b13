"""What a worker does for the dials of mismatch: rollout batches of a recipe, scored with replay off and with R3."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from vespo_megatron.data.template import load_tokenizer
from vespo_megatron.launch.prompts import load_run_prompts
from vespo_megatron.launch.worker import build_controller
from vespo_megatron.megatron import parallel
from vespo_megatron.megatron.policy import MegatronPolicy
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.trainer.mismatch import measure
from vespo_megatron.trainer.mismatch_table import FILE

METRICS = ("mismatch/k3", "routes/agreement")


def measured(
    store: str, recipe_file: str, run_dir: str, dials: list[dict[str, Any]], prefix: str = "policy.generation.mismatch."
) -> list[dict[str, dict]]:
    """Per setting of the dials, `METRICS` with replay off ("none") and with "R3", means over the batches."""
    rank_info = None
    answers = []
    for number, dial in enumerate(dials):
        values = {prefix + name: value for name, value in dial.items()}
        recipe = load_recipe(recipe_file).with_values(values)
        rank_info = rank_info or parallel.initialize(
            recipe.policy.megatron_cfg, seed=1, device=torch.device("cpu"), init_method=store
        )
        folder = Path(tempfile.mkdtemp(prefix=f"{number}_", dir=run_dir))
        controller = None
        if rank_info.rank == 0:
            tokenizer = load_tokenizer(recipe)
            prompts = load_run_prompts(recipe, tokenizer)
            controller = build_controller(recipe, folder, rank_info, tokenizer, prompts)
        try:
            measure(recipe, MegatronPolicy(recipe.policy, rank_info), controller, folder)
        finally:
            if controller is not None:
                controller.logger.close()
                controller.close()
        if controller is None:
            continue
        rows = json.loads((folder / FILE).read_text())
        answers.append({mode: _means([row for row in rows if row["replay"] == mode]) for mode in ("none", "R3")})
    return answers


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in METRICS}
