"""LiveCodeBench and Eurus as the hub has them: from a row to a prompt, and to the score of an answer."""

from __future__ import annotations

import base64
import json
import pickle
import zlib

import pyarrow.parquet
import pytest
from wall import needs_wall

from vespo_megatron.cli import main
from vespo_megatron.data.public.livecodebench import pickled_text, private_tests
from vespo_megatron.data.public.prepare import prepare
from vespo_megatron.errors import UserError
from vespo_megatron.rewards.code import code_reward
from vespo_megatron.rewards.code_tests import read_tests


def packed(cases, protocol=4):
    """As the hub has private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases), protocol=protocol))).decode()


def case(given, wanted, kind="stdin"):
    return {"input": given, "output": wanted, "testtype": kind}


def problem(number, public, private, *, day="2025-01-04", starter="", metadata=None):
    return {
        "question_title": f"Problem {number}",
        "question_content": f"Solve problem {number}.",
        "platform": "leetcode" if starter else "atcoder",
        "question_id": str(number),
        "contest_id": "weekly",
        "contest_date": f"{day}T00:00:00",
        "starter_code": starter,
        "difficulty": "hard",
        "public_test_cases": json.dumps(public),
        "private_test_cases": private,
        "metadata": json.dumps(metadata or {}),
    }


STARTER = "class Solution:\n    def pairs(self, xs: List[int]) -> List[List[int]]:\n        "
STDIN = problem(1, [case("2\n", "4\n")], packed([case("3\n", "9\n"), case("5\n", "25\n")]))
CALL = problem(
    2,
    [case("[1, 2]", "[[1, 2]]", "functional")],
    packed([case("[3, 4]", "[[3, 4]]", "functional")]),
    day="2025-04-05",
    starter=STARTER,
    metadata={"func_name": "pairs"},
)


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def prepared(tmp_path, rows, name="livecodebench_v6", **options):
    path = prepare(name, tmp_path / "out", local=write(tmp_path / "copy", "test6.jsonl", rows), **options)
    return pyarrow.parquet.read_table(path).to_pylist()


def test_a_row_has_its_day_its_difficulty_and_a_prompt_of_its_form(tmp_path):
    stdin, call = prepared(tmp_path, [STDIN, CALL])
    assert [row["extra_info"]["contest_date"] for row in (stdin, call)] == ["2025-01-04", "2025-04-05"]
    assert stdin["extra_info"] | {"index": 0} == {
        "index": 0,
        "split": "test",
        "question_id": "1",
        "platform": "atcoder",
        "difficulty": "hard",
        "contest_date": "2025-01-04",
    }
    text = stdin["prompt"][0]["content"]
    assert "Solve problem 1." in text and "from stdin" in text and "# YOUR CODE HERE" in text
    text = call["prompt"][0]["content"]
    assert "Solve problem 2." in text and STARTER in text and "starter code" in text and "stdin" not in text


def test_public_tests_come_first_and_private_ones_are_all_there(tmp_path):
    stdin, call = prepared(tmp_path, [STDIN, CALL])
    tests = read_tests(stdin["reward_model"]["ground_truth"])
    assert [(test.given, test.wanted) for test in tests] == [("2\n", "4\n"), ("3\n", "9\n"), ("5\n", "25\n")]
    tests = read_tests(call["reward_model"]["ground_truth"])
    assert [test.name for test in tests] == ["pairs"] * 2
    assert [(test.arguments, test.wanted) for test in tests] == [([[1, 2]], [[[1, 2]]]), ([[3, 4]], [[[3, 4]]])]


@needs_wall
def test_answers_are_told_apart_by_the_benchmark_s_own_comparison(tmp_path):
    stdin, call = prepared(tmp_path, [STDIN, CALL])

    def score(row, program):
        text = f"```python\n{program}\n```"
        return code_reward(row["data_source"], text, row["reward_model"]["ground_truth"], {}, test_timeout=60.0)[
            "score"
        ]

    assert score(stdin, "print(int(input()) ** 2)") == 1
    assert score(stdin, "print(int(input()) ** 2 + 1e-9)") == 0, "nothing is rounded"
    assert score(stdin, "print(4)") == 0, "private tests count"
    assert score(call, f"{STARTER}return [xs]") == 1
    assert score(call, f"{STARTER}return [tuple(xs)]") == 0
    assert score(call, f"{STARTER}return [[1, 2]]") == 0, "private tests count"


def test_problems_of_a_range_of_days(tmp_path):
    rows = [STDIN, CALL]
    assert [row["extra_info"]["question_id"] for row in prepared(tmp_path, rows, since="2025-01-05")] == ["2"]
    facts = json.loads((tmp_path / "out" / "livecodebench_v6.json").read_text())
    assert (facts["since"], facts["rows"]) == ("2025-01-05", 1)
    assert len(prepared(tmp_path, rows)) == 2, "made anew: it is another set"
    assert len(prepared(tmp_path, rows, since="2025-01-04", until="2025-01-04")) == 1
    with pytest.raises(UserError, match="no row is left"):
        prepared(tmp_path, rows, until="2024-12-31")
    with pytest.raises(UserError, match="--since: is 'May 2025'"):
        prepared(tmp_path, rows, since="May 2025")
    with pytest.raises(UserError, match="aime24 has no days"):
        prepare("aime24", tmp_path, local=tmp_path, since="2025-01-01")


def test_a_version_is_the_files_that_it_is_made_of(tmp_path, capsys):
    copy = write(tmp_path / "copy", "test6.jsonl", [CALL])
    assert main(["data", "prepare", "livecodebench_release_v6", "--from", str(copy), "--output", str(tmp_path)]) == 2
    assert "has no test.jsonl, test2.jsonl, test3.jsonl, test4.jsonl, test5.jsonl" in capsys.readouterr().err
    for number in ("", "2", "3", "4", "5"):
        write(copy, f"test{number}.jsonl", [STDIN])
    assert len(pyarrow.parquet.read_table(prepare("livecodebench_release_v6", tmp_path, local=copy))) == 6
    assert len(pyarrow.parquet.read_table(prepare("livecodebench_v6", tmp_path, local=copy))) == 1


def test_the_hub_s_files_are_named_one_by_one(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list([STDIN])

    monkeypatch.setattr(datasets, "load_dataset", load)
    prepare("livecodebench_v6", tmp_path, revision="abc")
    place = "hf://datasets/livecodebench/code_generation_lite@abc/test6.jsonl"
    assert asked == [(("json",), {"data_files": [place], "split": "train"})]


def test_sets_of_many_megabytes_are_written_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("vespo_megatron.data.public.prepare._BLOCK_BYTES", 300)
    rows = [problem(number, [], packed([case(f"{number}\n", "1\n")])) for number in range(7)]
    found = prepared(tmp_path, rows)
    assert [row["extra_info"]["index"] for row in found] == list(range(7))
    assert pyarrow.parquet.ParquetFile(tmp_path / "out" / "livecodebench_v6.parquet").num_row_groups > 1


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_a_text_is_read_in_every_protocol(protocol):
    text = json.dumps([case("ü\n", "1")])
    assert pickled_text(pickle.dumps(text, protocol=protocol)) == text
    assert (
        private_tests(packed([case("1", "2")], protocol))
        == [case("1", "2")]
        == private_tests('[{"input": "1", "output": "2", "testtype": "stdin"}]')
    )


@pytest.mark.parametrize("content", [Harmful(), ["[]"], {"a": "b"}, ("[]", "[]"), 7, b"[]", None])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_of_anything_else_is_refused_and_nothing_of_it_is_executed(content, protocol, capsys):
    with pytest.raises(ValueError, match="a pickle"):
        pickled_text(pickle.dumps(content, protocol=protocol))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "private", ["", "no base64!", base64.b64encode(b"no zlib").decode(), packed([])[:-8] + "AAAAAAA="]
)
def test_private_tests_in_another_encoding_name_the_row(private, tmp_path):
    with pytest.raises(UserError, match="livecodebench_v6, row 1: is not as expected"):
        prepared(tmp_path, [STDIN, problem(2, [], private)])
    assert not list((tmp_path / "out").glob("*")), "nothing is left behind"


# ---- Eurus -----------------------------------------------------------------------------------------------------------

SYSTEM = "When tackling complex reasoning tasks, you have access to the following actions."


def eurus(source, tests, ability="code"):
    """A row of PRIME-RL/Eurus-2-RL-Data, as its page shows them."""
    ask = "\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end."
    return {
        "data_source": source,
        "prompt": [{"content": SYSTEM, "role": "system"}, {"content": f"A problem.{ask}", "role": "user"}],
        "ability": ability,
        "reward_model": {"ground_truth": json.dumps(tests), "style": "rule"},
        "extra_info": {"index": 0, "split": "dummy"},
    }


PRINTS = "n = int(input())\nprint(*range(1, n + 1), sep='\\n')"
DEEP = "def down(n):\n    return n and down(n - 1)\ndef depth(n):\n    return down(n) + n"
FORMS = [
    ("codeforces", {"inputs": ["3\n"], "outputs": ["1\n2\n3\n"]}, PRINTS, "print('1\\n2')"),
    ("codecontests", {"inputs": ["3\n", "1\n"], "outputs": ["1\n2\n3", "1 \n"]}, PRINTS, "print('1\\n2\\n3')"),
    ("taco", {"inputs": [["2", "1 2"]], "outputs": [["1", "2"]]}, "input()\nprint(*input().split())", "print(1)"),
    ("apps", {"fn_name": "add", "inputs": ["1\n2"], "outputs": ["3"]}, "def add(a, b): return a + b", "add = max"),
    ("apps", {"fn_name": "add", "inputs": ["1\n2"], "outputs": ["[3]"]}, "def add(a, b): return a + b", "add = max"),
    ("taco", {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}, "def add(a, b): return a + b", "add = max"),
    (
        "apps",
        {"fn_name": "swap", "inputs": ['["a", "b"]'], "outputs": ['["b", "a"]']},
        "class Solution:\n    def swap(self, xs): return tuple(reversed(xs))",
        "class Solution:\n    def swap(self, xs): return xs",
    ),
    ("taco", {"fn_name": "depth", "inputs": ["20000"], "outputs": ["20000"]}, DEEP, "def depth(n): return 0"),
]


@needs_wall
def test_every_form_of_eurus_goes_from_the_hub_s_row_to_a_score(tmp_path):
    rows = [eurus(source, tests) for source, tests, _, _ in FORMS]
    rows.insert(1, eurus("numina_olympiads", "34", "math"))
    copy = write(tmp_path / "copy", "train.jsonl", rows)
    made = pyarrow.parquet.read_table(prepare("eurus_code", tmp_path / "out", local=copy)).to_pylist()
    assert [row["extra_info"]["source"] for row in made] == [source for source, *_ in FORMS]
    for row, (_, tests, right, wrong) in zip(made, FORMS, strict=True):
        assert [part["role"] for part in row["prompt"]] == ["system", "user"]
        truth = row["reward_model"]["ground_truth"]
        scores = [
            code_reward(row["data_source"], f"So:\n```python\n{program}\n```", truth, {}, test_timeout=60.0)["score"]
            for program in (right, wrong)
        ]
        assert scores == [1.0, 0.0], tests


# ---- HumanEval+ and MBPP+ --------------------------------------------------------------------------------------------

HARNESS = """
import numpy as np

def floats(x):
    return isinstance(x, float) or (isinstance(x, (list, tuple)) and all(isinstance(i, float) for i in x))

def assertion(out, exp, atol):
    if atol == 0 and floats(exp):
        atol = 1e-6
    if out != exp and atol != 0:
        assert np.allclose(out, exp, rtol=1e-07, atol=atol)
    else:
        assert out == exp, f"out: {out}, exp: {exp}"

"""
"""What EvalPlus's scripts begin with: floats within 1e-6, all else exactly."""
INPUTS = [[[float(number), number / 3, -1.5], "a"] for number in range(400)]
RESULTS = [[min(xs), max(xs)] for xs, _ in INPUTS]
OVER_ALL = f"inputs = {INPUTS}\nresults = {RESULTS}\nfor i, (inp, exp) in enumerate(zip(inputs, results)):\n"


def indented(text):
    return "".join(f"    {line}\n" for line in text.splitlines())


@needs_wall
def test_hundreds_of_inputs_in_evalplus_s_scripts_are_tried_within_the_floats_that_it_forgives(tmp_path):
    humaneval = {
        "task_id": "HumanEval/1",
        "prompt": "from typing import List\n\n\ndef ends(xs: List[float], name: str) -> List[float]:\n    ...\n",
        "entry_point": "ends",
        "canonical_solution": "…",
        "test": f"{HARNESS}def check(candidate):\n{indented(OVER_ALL + '    assertion(candidate(*inp), exp, 0)')}",
    }
    mbpp = {
        "task_id": 2,
        "prompt": "Write a function that finds both ends.",
        "code": "…",
        "source_file": "…",
        "test_list": ["assert ends([1, 2], 'a') == [1, 2]"],
        "test_imports": [],
        "test": f"{HARNESS}{OVER_ALL}    assertion(ends(*inp), exp, 0)\n",
    }
    programs = [
        ("def ends(xs, name):\n    return [min(xs) + 1e-8, max(xs)]", 1.0),
        ("def ends(xs, name):\n    return [min(xs), max(xs) + (xs[0] > 398) * 1e-3]", 0.0),  # the last input alone
        ("def ends(xs, name):\n    return [min(xs), float(max(xs)), 0.0]", 0.0),
    ]
    for name, row in (("humaneval_plus", humaneval), ("mbpp_plus", mbpp)):
        path = prepare(name, tmp_path / "out", local=write(tmp_path / name, f"{name}.jsonl", [row]))
        (made,) = pyarrow.parquet.read_table(path).to_pylist()
        assert "ends(" in made["prompt"][0]["content"]
        truth = made["reward_model"]["ground_truth"]
        for program, wanted in programs:
            text = f"```python\n{program}\n```"
            assert code_reward(name, text, truth, {}, test_timeout=60.0)["score"] == wanted, (name, program)
