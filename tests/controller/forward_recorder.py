"""Writes down the experts of every token in every forward of the in-process engine, beside its results."""

from __future__ import annotations

import functools
from collections import defaultdict

import numpy as np


class ForwardRecorder:
    """Of one engine, from now on.

    `seen` holds, for a sequence of token ids, what was chosen for the last of them: (weight version, experts [layers,
    topk]) of each forward that had it as its input.
    """

    def __init__(self, engine) -> None:
        self.engine, self.seen = engine, defaultdict(list)
        model = engine._model
        self._sequences = {}
        model.new_cache = functools.partial(self._new_cache, model.new_cache)
        model.prefill = functools.partial(self._prefill, model.prefill)
        model.decode = functools.partial(self._decode, model.decode)

    def _new_cache(self, original, rows, capacity):
        cache = original(rows, capacity)
        select = cache.select

        def select_with_sequences(kept):
            self._sequences[id(cache)] = [self._sequences[id(cache)][row] for row in kept.tolist()]
            select(kept)

        cache.select = select_with_sequences
        return cache

    def _prefill(self, original, ids, lengths, cache, flips=None):
        logits, routes = original(ids, lengths, cache, flips)
        sequences = [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
        for sequence, chosen in zip(sequences, routes.numpy(), strict=True):
            for end in range(len(sequence)):
                self._note(sequence[: end + 1], chosen[end])
        self._sequences[id(cache)] = sequences
        return logits, routes

    def _decode(self, original, tokens, positions, longest, cache, flips=None):
        logits, routes = original(tokens, positions, longest, cache, flips)
        sequences = self._sequences[id(cache)]
        for row, (token, chosen) in enumerate(zip(tokens.tolist(), routes.numpy(), strict=True)):
            sequences[row] = (*sequences[row], token)
            self._note(sequences[row], chosen)
        return logits, routes

    def _note(self, sequence, chosen):
        self.seen[sequence].append((self.engine.weight_version, np.sort(chosen, -1)))
