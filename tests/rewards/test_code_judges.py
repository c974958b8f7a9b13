"""Each set's answers are compared as its own harness does, and no other set's with it."""

from __future__ import annotations

import base64
import json
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wall import needs_wall

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import EnvConfig
from vespo_megatron.rewards import RewardPool
from vespo_megatron.rewards.code import code_reward
from vespo_megatron.rewards.code_judges import JUDGES, judge_of
from vespo_megatron.rewards.code_outputs import same_lines, same_output
from vespo_megatron.rewards.code_tests import read_tests, unreadable


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("livecodebench_v6", "livecodebench"),
        ("livecodebench/code_generation_lite", "livecodebench"),
        ("eurus_code", "prime"),
        ("PRIME-RL/Eurus-2-RL-Data", "prime"),
        ("taco", "prime"),
        ("mbpp_plus", "contest"),
        ("", "contest"),
    ],
)
def test_a_data_source_has_its_judge_and_a_recipe_may_name_another(source, name):
    assert judge_of(source) is JUDGES[name]
    assert judge_of(source, "contest") is JUDGES["contest"]
    with pytest.raises(UserError, match="one of contest, prime, livecodebench"):
        judge_of(source, "codeforces")


@pytest.mark.parametrize(
    ("printed", "wanted", "livecodebench", "contest"),
    [
        ("3\n", "3", True, True),
        ("  3 \n\n", "\n3\n", True, True),
        ("1 2\n3", "1 2\n3\n", True, True),
        ("1  2", "1 2", True, True),  # decimals, word by word
        ("a  b", "a b", False, True),  # words that are no decimals: the line as it is
        ("1 2 3", "1 2\n3", False, True),  # other lines
        ("1\n\n2", "1\n2", False, True),
        ("0.30000000000000004", "0.3", False, True),  # nothing is rounded
        ("0.30", "0.3", True, True),
        ("2.0", "2", True, True),
        ("1e3", "1000", True, True),
        ("50000000000000000", "50000000000000001", False, False),
        ("nan", "nan", True, True),  # the same text
        ("nan 1", "nan  1", False, True),  # nan equals no number
        ("snan 1", "1  1", False, False),
        ("YES", "yes", False, False),
        ("", "", True, True),
        ("", "0", False, False),
        ("3\r\n4\r\n", "3\n4\n", True, True),
    ],
)
def test_what_is_printed_is_compared_by_lines_or_by_words(printed, wanted, livecodebench, contest):
    assert same_lines(printed, wanted) is livecodebench
    assert same_output(printed, wanted) is contest


LINES = st.lists(st.lists(st.integers(-99, 99), min_size=1, max_size=3), min_size=1, max_size=4)


@given(LINES, LINES)
def test_lines_of_numbers_are_the_same_exactly_where_the_numbers_are(ours, theirs):
    def printed(rows, number="{}", between=" "):
        return "\n".join(between.join(number.format(each) for each in row) for row in rows)

    assert same_lines(printed(ours, "{}.00", "   ") + "\n", printed(theirs)) is (ours == theirs)
    assert same_lines(printed(ours), printed(ours))


@pytest.mark.parametrize(
    ("output", "result", "right"),
    [
        ("3", 3, {"contest", "prime", "livecodebench"}),
        ("3", 3.0, {"contest", "prime", "livecodebench"}),
        ("[3]", 3, {"prime"}),
        ("[3]", [3], {"contest", "prime", "livecodebench"}),
        ("[3, 4]", 3, set()),
        ("3", "3", {"contest", "prime"}),
        ('"3"', "3", {"contest", "prime", "livecodebench"}),
        ("0.3", 0.1 + 0.2, {"contest", "prime"}),
        ("true", True, {"contest", "prime", "livecodebench"}),
        ('{"a": [1]}', {"a": [1]}, {"contest", "prime", "livecodebench"}),
    ],
)
def test_what_a_function_returns_is_compared_with_a_line_of_json(output, result, right):
    (test,) = read_tests({"fn_name": "f", "inputs": ["1"], "outputs": [output]})
    assert {name for name, judge in JUDGES.items() if test.accepts(result, judge)} == right


def test_packed_tests_are_those_that_were_packed():
    tests = {"inputs": ["1 2\n"] * 5000, "outputs": ["3\n"] * 5000}
    packed = base64.b64encode(zlib.compress(json.dumps(tests).encode())).decode()
    assert len(packed) < 1000
    assert read_tests(json.dumps({"packed": packed})) == read_tests(tests)


@pytest.mark.parametrize("packed", ["%%", "AAAA", base64.b64encode(zlib.compress(b'{"inputs": []}')[:-3]).decode()])
def test_packed_tests_that_cannot_be_unpacked_are_told(packed):
    assert "cannot be unpacked" in unreadable({"packed": packed})


FUNCTION = "```python\nclass Solution:\n    def f(self, n):\n        {}\n```"


@needs_wall
@pytest.mark.parametrize(
    ("body", "wanted", "livecodebench", "contest"),
    [
        ("return (n, 2)", "[1, 2]", True, True),  # the outermost tuple is a list
        ("return [(n, 2)]", "[[1, 2]]", False, True),  # another is none
        ("return {n}", "[1]", False, True),
        ("return {n: 2}", '{"1": 2}', False, True),
        ("import numpy; return [numpy.int64(n)]", "[1]", True, False),
        ("return self.g(40000)\n    def g(self, n): return n and self.g(n - 1)", "0", True, False),  # deep
    ],
)
def test_types_and_depth_of_recursion_are_the_harness_s(body, wanted, livecodebench, contest):
    truth = {"fn_name": "f", "inputs": ["1"], "outputs": [wanted]}
    for source, right in (("livecodebench_v6", livecodebench), ("other", contest)):
        assert code_reward(source, FUNCTION.format(body), truth, {}, test_timeout=60.0)["score"] == float(right), source


@needs_wall
def test_livecodebench_ends_at_the_first_failure_and_others_count_what_passes():
    truth = {"inputs": ["1", "2", "3", "4"], "outputs": ["1", "0", "3", "4"]}
    echo = "```python\nprint(input())\n```"
    passed = [
        code_reward(source, echo, truth, {}, test_timeout=60.0)["passed"] for source in ("livecodebench", "other")
    ]
    assert passed == [0.25, 0.75]


def test_a_judge_that_is_none_is_told_before_the_first_response():
    env = EnvConfig(reward="code", reward_kwargs={"judge": "codeforces", "allow_unsafe_code": True})
    with pytest.raises(UserError, match="is 'codeforces'"):
        RewardPool(env)
    with pytest.raises(UserError, match="is 'codeforces'"):
        RewardPool(EnvConfig(reward="exact_match"), ['code {"judge": "codeforces"}'])
