"""Which prompts rest for a while: those last solved more often, or less often, than the recipe wants to train on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vespo_megatron.recipe.schema import CurriculumConfig


class Curriculum:
    """A prompt whose responses were solved at a rate outside the bounds is passed over the next times it comes."""

    def __init__(self, config: CurriculumConfig) -> None:
        self.config = config
        self.passed_over = 0
        """Times that a prompt came and was passed over."""
        self._resting: dict[str, int] = {}

    def admits(self, prompt_id: str) -> bool:
        """Whether a prompt that comes is taken; counts when not."""
        left = self._resting.get(prompt_id, 0)
        if not left:
            return True
        self.passed_over += 1
        self._resting[prompt_id] = left - 1
        if left == 1:
            del self._resting[prompt_id]
        return False

    def report(self, prompt_id: str, solved: float) -> None:
        """Its responses have been scored: `solved` is the share that was solved."""
        if self.config.rest and not self.config.min_solved <= solved <= self.config.max_solved:
            self._resting[prompt_id] = self.config.rest

    def state_dict(self) -> dict[str, Any]:
        """What rests, and for how long."""
        return {"passed_over": self.passed_over, "resting": dict(self._resting)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.passed_over, self._resting = state["passed_over"], dict(state["resting"])
