"""Keys of prompts and rewards: `data` and `env`."""

from __future__ import annotations

from typing import Any, Literal

from vespo_megatron.recipe.schema.base import Section, key, section


class DatasetConfig(Section):
    """One split of `data`."""

    path: str | None = key(None, "Parquet or JSONL file in veRL's schema.")
    max_samples: int | None = key(None, "Use the first so many rows.", ge=1)


class DataConfig(Section):
    """`data`: prompts."""

    train: DatasetConfig = section(DatasetConfig)
    validation: DatasetConfig = section(DatasetConfig)
    group_by: str | None = key(
        None, "Entry of extra_info that validation prompts are told apart by: eval/<set>/by/<value>.", ours=True
    )
    prompt_key: str = key("prompt", "Column of the prompt: chat messages or text.")
    max_input_seq_length: int = key(512, "Prompt tokens at most.", ge=1)
    on_long_prompt: Literal["error", "drop"] = key("error", "Prompts longer than max_input_seq_length.", ours=True)
    on_change: Literal["error", "restart"] = key(
        "error", "A resumed run finds other prompts than it was saved with: stop, or begin these anew.", ours=True
    )
    on_bad_ground_truth: Literal["error", "drop"] = key(
        "error", "Prompts whose ground truth the reward cannot read, so that no response can score.", ours=True
    )
    shuffle: bool = key(True, "Shuffle each epoch with grpo.seed.")


class EnvConfig(Section):
    """`env`: rewards."""

    reward: str = key("math", "math, exact_match, code, format, remote, or package.module:function.", ours=True)
    rewards: dict[str, float] = key(
        {}, "Reward → weight: a weighted sum, each part logged; in place of reward.", ours=True
    )
    reward_kwargs: dict[str, Any] = key({}, "Arguments of the reward; with `rewards`, reward → arguments.", ours=True)
    num_workers: int = key(1, "Reward worker processes.", ge=1)
    timeout: float = key(10.0, "Deadline of one score, in seconds.", gt=0, ours=True)
    on_unscored: Literal["zero", "drop", "error"] = key(
        "zero",
        "Responses whose score did not come (late, or the reward raised): reward 0, or out of baseline and loss, or an "
        "error. In evaluations, which leave nothing out, drop is zero.",
        ours=True,
    )
