"""A response drawn in several turns, token ids in and token ids out: nothing is ever decoded and tokenised again.

Serves what an environment answers between turns, and what `pause`, a deadline or an abort has cut short:

    conversation = Conversation(request, context_length=engine.context_length)
    while (turn := conversation.next_request()) is not None:
        (result,) = await engine.generate([turn])
        conversation.add(result)
        ... conversation.observe(token_ids_of_the_environment) ...
    sample_of(conversation.result(), conversation.loss_mask())

Turns carry the group of their request, so that the pool sends them where the prefix is cached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vespo_megatron.data.sample import UNKNOWN_VERSION
from vespo_megatron.data.sampling_mask import SamplingMask
from vespo_megatron.errors import UserError
from vespo_megatron.rollout_sglang.engine import GenerationRequest, GenerationResult

_OBSERVED = -1


class Conversation:
    """Prompt, turns and observations of one response.

    Args:
        request: of the first turn; its `max_new_tokens` bounds the tokens drawn in all turns together.
        context_length: of the engine: a conversation that has filled it is over.
        max_tokens_per_turn: bounds the tokens drawn in one turn; None: nothing else does.
    """

    def __init__(
        self, request: GenerationRequest, *, context_length: int, max_tokens_per_turn: int | None = None
    ) -> None:
        self.request, self.context_length = request, context_length
        self._per_turn = max_tokens_per_turn or request.sampling.max_new_tokens
        self._ids: list[int] = []
        self._turn_of: list[int] = []
        """The turn that each token was drawn in; _OBSERVED: in none."""
        self._log_probs: list[float] = []
        self._versions: list[int | None] = []
        self._sampling_masks: list[SamplingMask] = []
        self._routes: list[np.ndarray] = []
        self._route_versions: list[np.ndarray] = []
        self._finish_reason = ""
        self._turns = 0
        self._observed = False

    def next_request(self) -> GenerationRequest | None:
        """Asks for the next turn; None when it is over: ended by a stop token, at its length, or at the context.

        A turn that a stop token has ended goes on only after `observe`, one that was aborted goes on as it is.
        """
        ended = self._finish_reason == "stop" and not self._observed
        if ended or not self.has_room():
            return None
        return replace(
            self.request,
            request_id=f"{self.request.request_id}/{self._turns}" if self._turns else self.request.request_id,
            prompt_ids=(*self.request.prompt_ids, *self._ids),
            sampling=replace(self.request.sampling, max_new_tokens=min(self._left, self._per_turn)),
            group_id=self.request.group_id or self.request.request_id,
            routes_start=self.request.routes_start + sum(map(len, self._routes)),
        )

    @property
    def _left(self) -> int:
        return self.request.sampling.max_new_tokens - int(self.loss_mask().sum())

    def has_room(self, observed: int = 0) -> bool:
        """Whether another token may be drawn, after so many more that are observed."""
        length = len(self.request.prompt_ids) + len(self._ids) + observed
        return self._left >= 1 and length < self.context_length

    def add(self, result: GenerationResult) -> None:
        """What the engine drew for `next_request`."""
        self._ids += result.output_ids.tolist()
        self._turn_of += [self._turns] * len(result.output_ids)
        self._log_probs += result.behavior_log_probs.tolist()
        versions = result.weight_versions.tolist()
        self._versions = [versions[0] if versions and each is None else each for each in self._versions] + versions
        if result.routes is not None and result.route_versions is not None:
            self._routes.append(result.routes)
            self._route_versions.append(result.route_versions)
        self._sampling_masks.append(result.sampling_mask or SamplingMask.whole(len(result.output_ids)))
        self._finish_reason, self._observed = result.finish_reason, False
        self._turns += 1

    def observe(self, token_ids: Sequence[int]) -> None:
        """What the environment says: part of the response, never trained on.

        Its version is that of the next token drawn, by the weights that read it first.
        """
        self._ids += token_ids
        self._turn_of += [_OBSERVED] * len(token_ids)
        self._log_probs += [0.0] * len(token_ids)
        self._versions += [None] * len(token_ids)
        self._sampling_masks.append(SamplingMask.whole(len(token_ids)))
        self._observed = self._observed or len(token_ids) > 0

    def loss_mask(self) -> np.ndarray:
        """bool [R]: which tokens of the response were drawn."""
        return self.turns() != _OBSERVED

    def turns(self) -> np.ndarray:
        """int64 [R]: the turn that each token was drawn in, from 0; -1 where it was observed."""
        return np.array(self._turn_of, dtype=np.int64)

    def result(self) -> GenerationResult:
        """All turns as one response, as if drawn at once; the log-prob of an observed token is 0 and not to be used.

        Routes are one row per token but the last: each is of the forward that drew the token after it, in the turn that
        drew it. Those of the prompt and of tokens drawn before are not taken from a later turn, which ran them again.
        Raises `UserError` before the first turn, and after an observation that no turn followed.
        """
        if not self._turns or self._observed:
            raise UserError(
                "has no turn after its last observation" if self._turns else "has no turn yet",
                where=f"conversation {self.request.request_id}",
                expected="`add` of what the engine drew for `next_request`",
            )
        routes, route_versions = self._whole_routes()
        last = next((each for each in reversed(self._versions) if each is not None), 0)
        return GenerationResult(
            request_id=self.request.request_id,
            output_ids=np.array(self._ids, dtype=np.int64),
            behavior_log_probs=np.array(self._log_probs, dtype=np.float32),
            weight_versions=np.array([last if each is None else each for each in self._versions], dtype=np.int64),
            finish_reason=self._finish_reason,
            routes=routes,
            route_versions=route_versions,
            sampling_mask=SamplingMask.concatenate(self._sampling_masks) if self.request.wants_sampling_mask else None,
            extra={"turns": float(self._turns)},
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything said and drawn so far: numbers, texts and arrays; routes are None where there are none yet."""
        masks = SamplingMask.concatenate(self._sampling_masks)
        return {
            "ids": np.array(self._ids, dtype=np.int64),
            "turn_of": self.turns(),
            "log_probs": np.array(self._log_probs, dtype=np.float32),
            "versions": np.array([UNKNOWN_VERSION if v is None else v for v in self._versions], dtype=np.int64),
            "routes": np.concatenate(self._routes) if self._routes else None,
            "route_versions": np.concatenate(self._route_versions) if self._routes else None,
            "mask_counts": masks.counts,
            "mask_ids": masks.ids,
            "finish_reason": self._finish_reason,
            "turns": self._turns,
            "observed": self._observed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, of a conversation with the same request."""
        self._ids, self._turn_of = state["ids"].tolist(), state["turn_of"].tolist()
        self._log_probs = state["log_probs"].tolist()
        self._versions = [None if version == UNKNOWN_VERSION else version for version in state["versions"].tolist()]
        self._sampling_masks = [SamplingMask(state["mask_counts"], state["mask_ids"])]
        self._routes, self._route_versions = [], []
        if state["routes"] is not None:
            self._routes, self._route_versions = [state["routes"]], [state["route_versions"]]
        self._finish_reason, self._turns, self._observed = state["finish_reason"], state["turns"], state["observed"]

    def _whole_routes(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Rows of all turns and their versions; where a last turn without tokens leaves some out, of no version."""
        if not self._routes:
            return None, None
        routes, versions = np.concatenate(self._routes), np.concatenate(self._route_versions)
        missing = len(self.request.prompt_ids) + len(self._ids) - 1 - self.request.routes_start - len(routes)
        return (
            np.pad(routes, ((0, missing), (0, 0), (0, 0))),
            np.pad(versions, (0, missing), constant_values=UNKNOWN_VERSION),
        )
