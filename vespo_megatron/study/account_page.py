"""The account of `vespo-megatron mismatch` as a table and as a page: token by token, the worst ones first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vespo_megatron.study.pages import page
from vespo_megatron.trainer.mismatch_table import ACCOUNT

WORST = 20
"""Tokens in the table of the worst."""
SHOWN = 60
"""Responses that are shown."""
_FULL = 0.5
"""|log π/μ| at which a token's colour is full."""


@dataclass(frozen=True)
class Token:
    """One token of a response."""

    text: str
    total: float
    """log π − log μ."""
    parts: dict[str, float]
    layers: list[int]
    """Layers, from 1, in which engine and trainer chose other experts."""
    where: str
    distances: dict[int, float]
    """Layer → relative distance of the two programs' outputs; empty where the engine does not tell."""

    @property
    def hover(self) -> str:
        """What the pointer shows."""
        split = " ".join(f"{name} {value:+.2e}" for name, value in self.parts.items())
        layers = f" · other experts in layers {', '.join(map(str, self.layers))}" if self.layers else ""
        return f"log π/μ {self.total:+.3e} = {split}{layers}"

    @property
    def colour(self) -> str:
        """Red where π is below μ, blue above; the fuller, the further."""
        strength = min(1.0, abs(self.total) / _FULL) ** 0.5
        red, green, blue = (255, 105, 97) if self.total < 0 else (110, 160, 255)
        return "#" + "".join(f"{round(255 + (one - 255) * strength):02x}" for one in (red, green, blue))


@dataclass(frozen=True)
class Response:
    """One response, with what it earned."""

    name: str
    reward: float
    tokens: list[Token]

    @property
    def total(self) -> float:
        """log W of the whole response."""
        return sum(token.total for token in self.tokens)


@dataclass(frozen=True)
class PartRow:
    """One part over all tokens."""

    name: str
    mean: float
    mean_size: float
    largest: float
    share: float
    """Of the sum of all parts' sizes."""


@dataclass(frozen=True)
class LayerRow:
    """One layer over all tokens."""

    number: int
    differing: float
    """Share of the tokens whose experts differ."""
    distance: float | None
    """Mean relative distance of the outputs."""
    largest: float | None


def read_account(run_dir: Path) -> list[Response]:
    """What the workers left, in their order."""
    lines = (run_dir / ACCOUNT).read_text(encoding="utf-8").splitlines()
    return [_response(json.loads(line)) for line in lines]


def part_rows(responses: Sequence[Response]) -> list[PartRow]:
    """Each part over all tokens of all responses."""
    tokens = [token for response in responses for token in response.tokens]
    names = list(tokens[0].parts)
    values = np.array([[token.parts[name] for name in names] for token in tokens])
    sizes = np.abs(values)
    total = sizes.sum() or 1.0
    return [
        PartRow(name, float(column.mean()), float(size.mean()), float(size.max()), float(size.sum() / total))
        for name, column, size in zip(names, values.T, sizes.T, strict=True)
    ]


def layer_rows(responses: Sequence[Response]) -> list[LayerRow]:
    """Each layer in which anything differs or is known, over all tokens of all responses."""
    tokens = [token for response in responses for token in response.tokens]
    numbers = {number for token in tokens for number in (*token.layers, *token.distances)}
    rows = []
    for number in sorted(numbers):
        distances = [token.distances[number] for token in tokens if number in token.distances]
        rows.append(
            LayerRow(
                number,
                sum(number in token.layers for token in tokens) / len(tokens),
                float(np.mean(distances)) if distances else None,
                max(distances) if distances else None,
            )
        )
    return rows


def account_table(responses: Sequence[Response]) -> str:
    """Markdown: a row per part, and a row per layer."""
    lines = ["| part of log π/μ | mean | mean size | largest | share |", "|---|---|---|---|---|"]
    lines += [
        f"| {row.name} | {row.mean:+.2e} | {row.mean_size:.2e} | {row.largest:.2e} | {row.share:.1%} |"
        for row in part_rows(responses)
    ]
    layers = layer_rows(responses)
    if layers:
        lines += [
            "",
            "| layer | tokens with other experts | distance of hidden states | largest |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {row.number} | {row.differing:.2%} | {_number(row.distance)} | {_number(row.largest)} |"
            for row in layers
        ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def write_account_page(run_dir: Path) -> Path:
    """`account.html` beside the account: one file that asks nothing of a network."""
    responses = read_account(run_dir)
    tokens = [token for response in responses for token in response.tokens]
    output = run_dir / "account.html"
    output.write_text(
        page(
            "account.html.j2",
            title=f"Account of log π/μ: {run_dir.name}",
            parts=part_rows(responses),
            layers=layer_rows(responses),
            worst=sorted(tokens, key=lambda token: -abs(token.total))[:WORST],
            responses=sorted(responses, key=lambda response: -abs(response.total))[:SHOWN],
            count=len(responses),
            tokens=len(tokens),
        ),
        encoding="utf-8",
    )
    return output


def _response(row: dict[str, Any]) -> Response:
    names = list(row["parts"])
    tokens = []
    for index, text in enumerate(row["tokens"]):
        parts = {name: row["parts"][name][index] for name in names}
        where = f"{row['sample_id']}, token {index}"
        distances = {int(layer): values[index] for layer, values in row["hidden_distances"].items()}
        tokens.append(Token(text, sum(parts.values()), parts, row["differing_layers"][index], where, distances))
    return Response(f"batch {row['batch']}: {row['sample_id']}", row["reward"], tokens)
