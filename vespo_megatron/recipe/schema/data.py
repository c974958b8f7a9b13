"""Keys of prompts and rewards: `data` and `env`."""

from __future__ import annotations

import json
from typing import Any, Literal

from vespo_megatron.recipe.schema.base import MISSING, Section, key, section


class SetConfig(Section):
    """One set of prompts: where it is, and which of its rows are taken as what."""

    path: str | list[str] | None = key(
        None,
        "One or several of: a .parquet, .jsonl or .json file (compressed too), a folder of them or one that datasets "
        "saved, a pattern as in shards/*.parquet, a set on the hub as in owner/name.",
    )
    subset: str | None = key(None, "Of a set on the hub: its configuration.", ours=True)
    split: str = key("train", "Of a set on the hub, or of a saved one that has splits.", ours=True)
    revision: str | None = key(None, "Of a set on the hub: commit or tag; None: the newest.", ours=True)
    columns: dict[str, str] = key(
        {},
        "Column of veRL's schema → this set's own, as in {prompt: question, ground_truth: answer}; what has no column "
        "may be a constant, as in {data_source: =my_set}.",
        ours=True,
    )
    filter: list[str] = key(
        [], "Rows that are taken, as in level >= 3, subject in algebra|geometry, answer != ''; all hold.", ours=True
    )
    max_samples: int | None = key(None, "Use so many rows, drawn with grpo.seed.", ge=1)
    weight: float | None = key(
        None, "Of a training set: its share of the prompts drawn; None in all sets: they are one.", gt=0, ours=True
    )
    reward: str | None = key(None, "Of this set's rows, in place of env.reward.", ours=True)
    reward_kwargs: dict[str, Any] = key({}, "Its arguments.", ours=True)
    num_samples: int | None = key(
        None, "Of a validation set: responses per problem; None: grpo.val_num_generations.", ge=1, ours=True
    )
    temperature: float | None = key(
        None, "Of a validation set; None: policy.generation.val_temperature.", ge=0, ours=True
    )
    top_p: float | None = key(None, "Of a validation set; None: policy.generation.val_top_p.", gt=0, le=1, ours=True)

    @property
    def places(self) -> list[str]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else list(self.path or [])

    @property
    def reward_choice(self) -> str:
        """`reward` and its arguments as JSON, in one text; empty without one."""
        return f"{self.reward} {json.dumps(self.reward_kwargs, sort_keys=True)}" if self.reward else ""


class DatasetConfig(SetConfig):
    """One split of `data`: a set, or several by name."""

    sets: dict[str, SetConfig] = key(
        {},
        "Several sets by name, each with the keys of one; in place of path. Evaluations go by these names.",
        ours=True,
    )
    streaming: bool = key(
        False, "Of training: rows are read as they are needed, for sets that are larger than the disk.", ours=True
    )

    @property
    def given(self) -> dict[str, SetConfig]:
        """The sets by name; a single one has none."""
        return dict(self.sets) if self.sets else {"": self} if self.path else {}


class CurriculumConfig(Section):
    """`data.curriculum`: training prompts that are solved too often, or too seldom, rest for a while."""

    rest: int = key(0, "Times that such a prompt is passed over when it comes; 0: none ever is.", ge=0, ours=True)
    min_solved: float = key(
        0.0, "A prompt rests when a smaller share of its responses was solved the last time.", ge=0, le=1, ours=True
    )
    max_solved: float = key(1.0, "Or a larger share.", ge=0, le=1, ours=True)
    solved_above: float = key(
        0.5,
        "A response is solved when its reward, before grpo.reward_shaping, is above this.",
        ge=-1000,
        le=1000,
        ours=True,
    )


class DataConfig(Section):
    """`data`: prompts."""

    train: DatasetConfig = section(DatasetConfig)
    validation: DatasetConfig = section(DatasetConfig)
    curriculum: CurriculumConfig = section(CurriculumConfig)
    group_by: str | None = key(
        None, "Entry of extra_info that validation prompts are told apart by: eval/<set>/by/<value>.", ours=True
    )
    prompt_key: str = key("prompt", "Column of the prompt: chat messages or text.")
    system_prompt_file: str | None = key(
        None, "A text that goes before the messages of every prompt that has no system message.", ours=True
    )
    max_input_seq_length: int = key(512, "Prompt tokens at most.", ge=1)
    on_long_prompt: Literal["error", "drop"] = key("error", "Prompts longer than max_input_seq_length.", ours=True)
    on_change: Literal["error", "restart"] = key(
        "error", "A resumed run finds other prompts than it was saved with: stop, or begin these anew.", ours=True
    )
    on_bad_ground_truth: Literal["error", "drop"] = key(
        "error", "Prompts whose ground truth the reward cannot read, so that no response can score.", ours=True
    )
    on_contamination: Literal["keep", "drop", "error"] = key(
        "keep", "Training prompts that are validation prompts too: counted and kept, left out, or an error.", ours=True
    )
    shuffle: bool = key(True, "Shuffle each epoch with grpo.seed.")
    shuffle_buffer: int = key(10_000, "With streaming: rows that are shuffled at a time.", ge=1, ours=True)
    num_workers: int = key(2, "Processes that tokenise a large set the first time.", ge=1, ours=True)

    @property
    def reward_choices(self) -> list[str]:
        """Rewards of single sets, of training and validation (`SetConfig.reward_choice`)."""
        sets = [*self.train.given.values(), *self.validation.given.values()]
        return sorted({each.reward_choice for each in sets if each.reward})


class RewardChoice(Section):
    """A reward and its arguments."""

    reward: str = key(MISSING, "As env.reward.", ours=True)
    reward_kwargs: dict[str, Any] = key({}, "Its arguments.", ours=True)


class EnvConfig(Section):
    """`env`: rewards, and the environment that answers between turns."""

    reward: str = key(
        "math", "math, exact_match, code, format, remote, judge, none, or package.module:function.", ours=True
    )
    rewards: dict[str, float] = key(
        {}, "Reward → weight: a weighted sum, each part logged; in place of reward.", ours=True
    )
    reward_kwargs: dict[str, Any] = key({}, "Arguments of the reward; with `rewards`, reward → arguments.", ours=True)
    reward_by_source: dict[str, RewardChoice] = key(
        {},
        "Pattern of data_source → {reward, reward_kwargs}, as in {math*: {reward: math}, code/*: {reward: code}}: the "
        "first that matches, in place of reward. A source that none matches is an error.",
        ours=True,
    )
    num_workers: int = key(1, "Reward worker processes.", ge=1)
    timeout: float = key(10.0, "Deadline of one score, in seconds.", gt=0, ours=True)
    on_unscored: Literal["zero", "drop", "error"] = key(
        "zero",
        "Responses whose score did not come (late, or the reward raised): reward 0, or out of baseline and loss, or an "
        "error. In evaluations, which leave nothing out, drop is zero.",
        ours=True,
    )
    # `class` is a word of Python's: no attribute of that name can be written.
    __annotations__["class"] = "str | None"
    locals()["class"] = key(
        None,
        "What answers between turns: calculator, python, or package.module:Environment; None: responses of one turn.",
        ours=True,
    )
    options: dict[str, Any] = key({}, "Arguments of the environment's constructor.", ours=True)
    num_environments: int = key(
        128,
        "Environments alive at a time, each in a process of its own; 0: as many as there are responses, in the "
        "controller's process, for environments that are plain and quick or wait in coroutines alone.",
        ge=0,
        ours=True,
    )
    turn_timeout: float = key(30.0, "Deadline of one reset or step of an environment, in seconds.", gt=0, ours=True)
    max_tokens_per_turn: int | None = key(
        None,
        "Tokens drawn in one turn at most; None: policy.generation.max_new_tokens, which bounds all turns together.",
        ge=1,
        ours=True,
    )

    @property
    def environment(self) -> str | None:
        """The key `class`."""
        return getattr(self, "class")
