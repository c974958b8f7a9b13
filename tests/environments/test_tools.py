"""The environments that are shipped: a calculator and a Python tool."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wall import needs_wall

from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.environments import Turn
from vespo_megatron.environments.calculator import Calculator, reckon
from vespo_megatron.environments.python_tool import PythonTool
from vespo_megatron.environments.registry import check
from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import EnvConfig
from vespo_megatron.rewards import wall


def answered(environment, text):
    assert environment.reset(PromptRecord("p", (1,), "s", "")) is None
    return environment.step(Turn(0, (1, 2), text))


# ---- the calculator ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "number"),
    [
        ("3+8+1", "12"),
        (" 2 * (3 - 5) ", "-4"),
        ("7/2", "3.5"),
        ("6/2", "3"),
        ("7//2 + 7 % 4", "6"),
        ("-3.5 * +2", "-7"),
        ("12345678901234567890 * 10", "123456789012345678900"),
    ],
)
def test_the_calculator_reckons(expression, number):
    assert reckon(expression) == number


whole = st.integers(-50, 50)
expressions = st.recursive(
    whole.map(lambda number: (f"({number})", Fraction(number))),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(
        lambda parts: (
            f"({parts[0][0]}{parts[1]}{parts[2][0]})",
            {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__}[parts[1]](parts[0][1], parts[2][1]),
        )
    ),
    max_leaves=8,
)


@given(expressions)
def test_whole_numbers_are_exact(drawn):
    text, value = drawn
    assert reckon(text) == str(value.numerator)


@given(st.text(st.sampled_from("0123456789+-*/%().e_ x'\n"), max_size=30))
def test_whatever_is_written_is_a_number_or_an_error_at_once(text):
    step = answered(Calculator(opens="calc(", closes=""), f"calc({text}")
    assert not step.done and step.tool_errors == (step.observation[0]["content"] == "error")


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "1/0",
        "9**9**9",
        "1+",
        "x",
        "__import__('os')",
        "'a'*9",
        "True",
        "1e400",
        "(" * 900,
        "9" * 101,
        "1" * 2000,
        "[1]",
    ],
)
def test_what_is_no_arithmetic_is_an_error_that_is_counted(expression):
    started = time.monotonic()
    step = answered(Calculator(), f"so <calculator>{expression}</calculator>")
    assert step.observation == [{"role": "tool", "content": "error"}] and step.tool_errors == 1 and not step.done
    assert time.monotonic() - started < 5


def test_the_last_call_of_a_turn_counts_and_a_turn_without_a_whole_one_is_the_last():
    tool = Calculator(role="user")
    text = "<calculator>1+1</calculator> or <calculator>2+2</calculator>"
    assert answered(tool, text).observation == [{"role": "user", "content": "4"}]
    assert answered(tool, r"\boxed{4}").done and answered(tool, "<calculator>1+1").done


# ---- the Python tool ---------------------------------------------------------------------------------------------


def python(program):
    return f"Let me see.\n```python\n{program}\n```"


@needs_wall
def test_a_program_s_output_is_what_is_read_next():
    step = answered(PythonTool(), python("import math\nprint(math.comb(10, 3))\nprint('done')"))
    assert step == ([{"role": "tool", "content": "120\ndone"}], 0.0, False, 0)
    assert answered(PythonTool(), "The answer is 120.").done
    assert answered(PythonTool(role="user"), python("x = 1")).observation == [
        {"role": "user", "content": "(nothing was printed)"}
    ]


@needs_wall
@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("print(1)\n1 / 0", "1\nZeroDivisionError: division by zero"),
        ("print(", "SyntaxError: '(' was never closed (program, line 1)"),
        ("import sys\nprint('out')\nsys.exit(3)", "out"),
    ],
)
def test_a_program_that_fails_says_how_and_is_counted(program, told):
    step = answered(PythonTool(), python(program))
    assert (step.observation[0]["content"], step.tool_errors, step.done) == (told, 1, False)


@needs_wall
def test_a_program_without_an_end_is_ended_and_long_output_is_cut_in_its_middle():
    started = time.monotonic()
    step = answered(PythonTool(seconds=1.0), python("print('begun', flush=True)\nwhile True: pass"))
    assert step.observation[0]["content"] == "begun\nended after 1 s or 1024 MiB" and step.tool_errors == 1
    assert time.monotonic() - started < 30
    content = answered(PythonTool(max_characters=10), python("print('a' * 50 + 'b' * 50)")).observation[0]["content"]
    assert content == "aaaaa\n…\nbbbbb"


@needs_wall
def test_programs_are_fenced_and_nothing_of_one_is_left_for_the_next():
    tool = PythonTool()
    first = answered(tool, python("open('note', 'w').write('1')\nprint('written')"))
    assert first.observation[0]["content"] == "written"
    second = answered(
        tool, python("import os, socket\nprint(os.path.exists('note'))\nsocket.create_connection(('127.0.0.1', 1))")
    )
    assert second.observation[0]["content"].startswith("False\nConnectionRefusedError") and second.tool_errors == 1


def test_where_nothing_fences_programs_the_tool_is_refused_before_a_run_unless_it_is_allowed(monkeypatch):
    def nothing():
        raise UserError("nothing here fences what a policy writes")

    monkeypatch.setattr("vespo_megatron.rewards.code.find_wall", nothing)
    with pytest.raises(UserError, match="nothing here fences"):
        check(EnvConfig(**{"class": "python"}))
    unsafe = EnvConfig(**{"class": "python", "options": {"allow_unsafe_code": True}})
    assert check(unsafe) == wall.NONE.description and check(EnvConfig(**{"class": "calculator"})) is None
