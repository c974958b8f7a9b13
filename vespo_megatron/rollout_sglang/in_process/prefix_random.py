"""Random numbers that belong to a token and everything before it, whatever runs beside it and however it was drawn.

A row's state is a 64-bit hash of seed, weight version and tokens so far; SplitMix64's finaliser (Steele, Lea and Flood,
OOPSLA 2014) stirs it. A prompt that requests share, a response that goes on in another turn and a response drawn alone
meet the same numbers at the same tokens.
"""

from __future__ import annotations

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)


class PrefixRandom:
    """Rows that each read their tokens, and the numbers of the last token read.

    Args:
        states: uint64 [rows].
    """

    def __init__(self, states: np.ndarray) -> None:
        self.states = states

    @classmethod
    def new(cls, rows: int, seed: int, version: int) -> PrefixRandom:
        """Before any token."""
        start = np.array([seed % (1 << 64), version], dtype=np.uint64)
        return cls(np.full(rows, _stir(_stir(start[:1]) ^ start[1:])[0]))

    def read(self, tokens: np.ndarray) -> None:
        """The next token of every row: int [rows]."""
        self.states = _stir(self.states ^ _stir(tokens.astype(np.uint64) + np.uint64(1)))

    def read_all(self, tokens: np.ndarray) -> np.ndarray:
        """The next tokens of every row, int [rows, T]; the states after each, uint64 [rows, T]."""
        passed = np.zeros(tokens.shape, dtype=np.uint64)
        for position in range(tokens.shape[1]):
            self.read(tokens[:, position])
            passed[:, position] = self.states
        return passed

    def select(self, rows: np.ndarray) -> PrefixRandom:
        """These rows, in this order; a row may be repeated."""
        return PrefixRandom(self.states[rows])

    def normals(self, salts: np.ndarray) -> np.ndarray:
        """A standard normal number for each row, float64 [rows], another one for another salt (uint64 [rows])."""
        salted = _stir(self.states ^ _stir(salts))
        pair = uniforms(salted, 2)
        return np.sqrt(-2 * np.log1p(-pair[:, 0])) * np.cos(2 * np.pi * pair[:, 1])


def uniforms(states: np.ndarray, count: int) -> np.ndarray:
    """float64 [..., count] in [0, 1): the numbers of states, uint64 [...]."""
    lanes = np.arange(1, count + 1, dtype=np.uint64) * _STEP
    return (_stir(states[..., None] + lanes) >> np.uint64(11)) * 2.0**-53


def _stir(numbers: np.ndarray) -> np.ndarray:
    numbers = numbers + _STEP
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
