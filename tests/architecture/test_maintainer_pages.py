"""The pages for readers name what is there: every path, package and container, in the order the contracts have."""

from __future__ import annotations

import ast
import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vespo_megatron"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
FOLDERS = {path.name for path in PACKAGE.iterdir() if path.is_dir()} | {"tests", "docs", "benchmarks", "examples"}
NOT_KEPT = ("runs/", "build/", "checkpoints/")


def paths_of(page: Path) -> set[str]:
    """What a page has between backticks that looks like a path of the repository: a suffix, or a folder we have."""
    found = re.findall(r"`([\w.-]+(?:/[\w.*-]+)*/?(?:\.\w+)?)(?:::?[\w.]+)?`", page.read_text())
    source = (".py", ".md", ".j2", ".yaml", ".sh", ".toml", ".def", ".txt")
    return {
        name
        for name in found
        if "/" in name
        and not any(part in name for part in NOT_KEPT)
        and (name.split("/")[0] in FOLDERS or name.endswith(source))
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_path_that_a_page_names_is_there(page):
    bases = (ROOT, PACKAGE, page.parent, *(folder for folder in PACKAGE.iterdir() if folder.is_dir()))
    missing = [name for name in paths_of(page) if not any(any(base.glob(name.rstrip("/"))) for base in bases)]
    assert not missing


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_package_map_is_complete_and_in_the_order_of_the_contract():
    config = configparser.ConfigParser()
    config.read(ROOT / ".importlinter")
    layers = re.findall(r"vespo_megatron\.(\w+)", config["importlinter:contract:layers"]["layers"])
    rows = re.search(r"## Packages\n.*?(\| Package.*?)\n\n", TEXT, re.DOTALL)[1]
    named = re.findall(r"`(\w+)/`", "".join(line.split("|")[1] for line in rows.splitlines()))
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert set(named) == folders
    order = [name for name in layers if name in folders]
    rank = {name: index for index, name in enumerate(order)}
    lines = [re.findall(r"`(\w+)/`", line.split("|")[1]) for line in rows.splitlines()]
    firsts = [min(rank[name] for name in line) for line in lines if line]
    assert firsts == sorted(firsts)


def fields_of(path: str, name: str) -> set[str]:
    tree = ast.parse((PACKAGE / path).read_text())
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {node.target.id for node in found.body if isinstance(node, ast.AnnAssign)}


def test_every_container_on_a_samples_way_has_the_fields_that_the_page_says():
    rows = re.findall(r"^\| `(\w+)` \| `([\w/.]+)` \| [^|]* \| ([^|]*) \|$", TEXT, re.MULTILINE)
    assert [name for name, _, _ in rows][:5] == [
        "PromptRecord",
        "GenerationRequest",
        "GenerationResult",
        "Sample",
        "Batch",
    ]
    assert len(rows) == 11
    for name, path, holds in rows:
        said = {word for word in re.findall(r"`(\w+)`", holds) if word[0].islower()}
        assert said and said <= fields_of(path, name), f"{name}: {said - fields_of(path, name)}"


def test_every_thread_that_is_started_is_on_the_page():
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in ("Thread", "ThreadPoolExecutor"):
                names |= {
                    keyword.value.value
                    for keyword in call.keywords
                    if keyword.arg in ("name", "thread_name_prefix") and isinstance(keyword.value, ast.Constant)
                }
    assert len(names) >= 10
    assert [name for name in names if f"`{name}`" not in TEXT] == []


@pytest.mark.parametrize(
    ("what", "where"),
    [
        ("Signs of life", "run/heartbeat.py"),
        ("φ of every objective", "losses/objectives/__init__.py"),
        ("truncated sampling", "data/sampling_mask.py"),
        ("lock between generation", "rollout_sglang/readers_writer_lock.py"),
        ("Evaluation: answers", "controller/evaluation.py"),
        ("Corrections of the gap", "losses/correction/__init__.py"),
        ("How stale a sample may be", "controller/staleness.py"),
        ("CPU platform", "rollout_sglang/plugin/cpu_platform.py"),
        ("Saving and resuming", "trainer/checkpoint.py"),
    ],
)
def test_what_a_newcomer_looks_for_is_what_its_file_says_first(what, where):
    assert what in ast.get_docstring(ast.parse((PACKAGE / where).read_text())).splitlines()[0]
    assert (PACKAGE / "slurm" / "templates" / "job.sbatch.j2").is_file()
