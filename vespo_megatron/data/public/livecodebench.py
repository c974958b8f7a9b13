"""LiveCodeBench's rows as prompts: the problem with its starter code, public and private tests together, packed.

Columns and encodings: `lcb_runner/benchmarks/code_generation.py` of LiveCodeBench/LiveCodeBench. Private tests are
JSON, or base64 of zlib of a pickle of a text of JSON. A pickle is a program; this one is read, never run.
"""

from __future__ import annotations

import base64
import json
import pickletools
import zlib
from collections.abc import Mapping
from typing import Any

COLUMNS = (
    *("question_content", "question_id", "platform", "difficulty", "contest_date"),
    *("starter_code", "public_test_cases", "private_test_cases", "metadata"),
)
_WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
_WITH_INPUT = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows."
)
"""The benchmark's own words (`lcb_runner/prompts/code_generation.py`)."""
_TEXTS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_HARMLESS = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}
_LARGEST = 1 << 30
"""Bytes of one problem's private tests, unpacked."""


def prompt(row: Mapping[str, Any]) -> str:
    """The benchmark's generic question (its system message is not among it)."""
    starter = row["starter_code"]
    asked = _WITH_STARTER if starter else _WITH_INPUT
    code = f"```python\n{starter or '# YOUR CODE HERE'}\n```"
    return (
        f"### Question:\n{row['question_content']}\n\n### Format: {asked}\n{code}\n\n"
        "### Answer: (use the provided format with backticks)\n\n"
    )


def tests(row: Mapping[str, Any]) -> str:
    """JSON of `{"packed"}`, a form of the code reward's: all inputs and outputs, and the function's name if it has one.

    Raises ValueError where a row's tests are in none of the published encodings.
    """
    cases = [*json.loads(row["public_test_cases"]), *private_tests(row["private_test_cases"])]
    found = {"inputs": [case["input"] for case in cases], "outputs": [case["output"] for case in cases]}
    if name := json.loads(row["metadata"]).get("func_name"):
        found["fn_name"] = name
    return json.dumps({"packed": base64.b64encode(zlib.compress(json.dumps(found).encode())).decode()})


def private_tests(text: str) -> list[dict[str, Any]]:
    """The cases of `private_test_cases`. Raises ValueError where it is in none of the published encodings."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        unpacking = zlib.decompressobj()
        pickled = unpacking.decompress(base64.b64decode(text, validate=True), _LARGEST)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"private tests that are neither JSON nor packed ({error})") from None
    if not unpacking.eof:
        raise ValueError("private tests that are cut off, or larger than a GiB")
    return json.loads(pickled_text(pickled))


def pickled_text(pickled: bytes) -> str:
    """The text that a pickle of one text holds; nothing of it is executed. Raises ValueError where it is another."""
    texts = []
    for code, argument, _ in pickletools.genops(pickled):
        if code.name in _TEXTS:
            texts.append(str(argument))
        elif code.name not in _HARMLESS:
            raise ValueError(f"a pickle that is more than a text ({code.name})")
    if len(texts) != 1:
        raise ValueError(f"a pickle of {len(texts)} texts")
    return texts[0]


def contest_day(row: Mapping[str, Any]) -> str:
    """As in 2025-01-11, whether a reader has made a time of the column's text or not."""
    return str(row["contest_date"])[:10]
