"""Of a run's checkpoints the one that its evaluations say is the best."""

from __future__ import annotations

from pathlib import Path

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.loader import load_recipe
from vespo_megatron.run.checkpoint_judgement import Record
from vespo_megatron.run.checkpoint_store import CheckpointStore
from vespo_megatron.run.run_directory import RECIPE_FILE

DEFAULT_METRIC = "eval/average"
"""Where the run's own recipe names none: as the VESPO paper selects (arXiv 2602.10693 v3, appendix D)."""


def best_checkpoint(run: str | Path) -> Path:
    """The checkpoint whose `checkpointing.metric_name` is the best; the newer one of equals.

    Raises:
        UserError: `run` is none, or has kept no checkpoint whose metric is in its record.
    """
    run = Path(run)
    if not (run / RECIPE_FILE).is_file():
        raise UserError("is no run", where=str(run), expected=f"a run's folder, with {RECIPE_FILE}")
    config = load_recipe(run / RECIPE_FILE).checkpointing
    metric = config.metric_name or DEFAULT_METRIC
    found = CheckpointStore(run / "checkpoints").checkpoints()
    ranked = Record(run, lambda _: False).judge(metric, found).ranked(found, higher_is_better=config.higher_is_better)
    if not ranked:
        raise UserError(
            f"has kept {len(found)} checkpoints, and {metric} of none",
            where=str(run),
            expected="checkpoints of steps that were evaluated (grpo.val_period, checkpointing.save_period)",
        )
    return found[ranked[0]]
