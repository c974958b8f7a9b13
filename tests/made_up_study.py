"""A small study, and runs of it that nobody ran."""

from __future__ import annotations

import json

SMALL = """
name: small
base: {base}
output: {output}
seeds: [1, 2]
overrides: [grpo.max_num_steps=2, grpo.num_prompts_per_step=8, grpo.val_period=1, grpo.max_val_samples=16,
            checkpointing.save_hf=false, logger.tensorboard_enabled=false]
variants:
  vespo: [loss_fn.name=vespo]
  again: [loss_fn.name=vespo]
  broken: [loss_fn.name=vespo, data.train.path=/no/such/prompts.parquet]
accuracy: eval/running_sums/avg@1
parallel: 2
"""


def made_up(study, accuracy_of, *, steps=4, unfinished=()):
    """Write every cell's metrics, its accuracies being `accuracy_of(cell, steps)`; a summary where it has finished."""
    for cell in study.cells():
        folder = study.folder(cell)
        folder.mkdir(parents=True)
        with (folder / "metrics.jsonl").open("w") as file:
            for step, value in enumerate(accuracy_of(cell, steps)):
                record = {"step": step, "reward/mean": value, "vespo/ess": 0.9, study.accuracy: value}
                file.write(json.dumps(record) + "\n")
        if cell.levels not in unfinished:
            (folder / "summary.json").write_text(json.dumps({"seconds": 10.0}))
