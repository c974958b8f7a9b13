"""`vespo-megatron data prepare`: a public set as parquet in veRL's schema, with a manifest that says what it is.

Idempotent: a set that is there, made from the same source and unchanged since, is left alone. The file appears whole
or not at all, and the manifest after it; a download that was cut off goes on where `datasets` left it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vespo_megatron.data.public.sets import SETS, PublicSet
from vespo_megatron.errors import UserError
from vespo_megatron.outputs import check_folder, written

_LOCAL = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
MADE_BY = 2
"""Raised when a transformation changes: what an older one made is made anew."""
_BLOCK_ROWS, _BLOCK_BYTES = 10_000, 1 << 26
"""What is written at a time: rows, or what their tests take of memory."""


def prepare(
    name: str,
    output: str | Path,
    *,
    local: str | Path | None = None,
    revision: str | None = None,
    since: str | None = None,
    until: str | None = None,
    force: bool = False,
) -> Path:
    """Write `<output>/<name>.parquet` and `<name>.json`; the parquet's path.

    Args:
        local: a file, or a folder of parquet or JSONL files, with the hub's columns; None downloads.
        revision: commit or tag on the hub; None is the newest.
        since, until: days as in 2025-01-31, of sets whose rows have one: the first and the last that are taken.
        force: make it anew.

    Raises:
        UserError: an unknown set, days where rows have none, a source that cannot be reached or read, missing columns,
            no rows left, an output that cannot be written.
    """
    if name not in SETS:
        raise UserError(f"unknown set {name!r}", where="data prepare", expected=f"one of {', '.join(SETS)}")
    output = Path(output)
    path, manifest = output / f"{name}.parquet", output / f"{name}.json"
    days = _days(name, SETS[name], since, until)
    wanted = {
        "set": name,
        "source": str(Path(local).resolve()) if local else SETS[name].source,
        "split": SETS[name].split,
        "revision": revision,
        "made_by": MADE_BY,
    } | days
    if not force and _is_current(path, manifest, wanted):
        return path
    check_folder(output, "--output")
    rows, found_revision = _read(SETS[name], local, revision)
    with written(output, "--output"):
        output.mkdir(parents=True, exist_ok=True)
        number = _write_parquet(path, _transform(name, SETS[name], rows, days))
        facts = wanted | {"found_revision": found_revision, "rows": number, "reward": SETS[name].reward}
        _write_manifest(manifest, facts | {"sha256": _digest(path)})
    return path


def _days(name: str, public: PublicSet, since: str | None, until: str | None) -> dict[str, str | None]:
    """Both, for the manifest of a set whose rows have days; nothing for another's."""
    days = {"since": since, "until": until}
    for key, day in days.items():
        if day is None:
            continue
        if public.day is None:
            raise UserError(f"{name} has no days", where=f"--{key}", fix="leave it out")
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", day):
            raise UserError(f"is {day!r}", where=f"--{key}", expected="a day as in 2025-01-31")
    return days if public.day else {}


def _is_current(path: Path, manifest: Path, wanted: dict[str, Any]) -> bool:
    try:
        facts = json.loads(manifest.read_text())
    except (OSError, ValueError):
        return False
    return path.is_file() and {key: facts.get(key) for key in wanted} == wanted and facts.get("sha256") == _digest(path)


def _read(public: PublicSet, local: str | Path | None, revision: str | None) -> tuple[Any, str | None]:
    import datasets

    datasets.disable_progress_bars()
    if local is not None:
        files = _local_files(Path(local), public.files)
        try:
            rows = datasets.load_dataset(_LOCAL[files[0].suffix], data_files=[str(f) for f in files], split="train")
        except Exception as error:  # datasets wraps every parser's own exceptions
            raise UserError(f"cannot be read ({error.__cause__ or error})", where=str(local)) from None
        found = None
    else:
        try:
            if public.files:
                at = f"hf://datasets/{public.source}" + (f"@{revision}" if revision else "")
                places = [f"{at}/{file}" for file in public.files]
                rows = datasets.load_dataset("json", data_files=places, split="train")
            else:
                rows = datasets.load_dataset(public.source, public.config, split=public.split, revision=revision)
        except Exception as error:  # a dozen kinds: DNS, proxies, gated sets, missing revisions
            raise UserError(
                f"cannot be had from the hub ({type(error).__name__}: {str(error).splitlines()[0][:200]})",
                where=public.source,
                expected="a connection to the Hugging Face hub, or a copy",
                fix="download it elsewhere (hf download --repo-type dataset …) and name the folder with --from",
            ) from None
        found = _hub_revision(rows)
    missing = [column for column in public.columns if column not in rows.column_names]
    if missing:
        raise UserError(
            f"has no column {', '.join(missing)}",
            where=str(local or public.source),
            expected=f"the columns of {public.source}; found {', '.join(rows.column_names)}",
        )
    return rows, found


def _hub_revision(rows: Any) -> str | None:
    """The commit the rows came from: `datasets` names the files as …@<commit>/…."""
    for source in getattr(rows.info, "download_checksums", None) or {}:
        _, at, rest = source.partition("@")
        if at:
            return rest.partition("/")[0]
    return None


def _local_files(path: Path, named: tuple[str, ...]) -> list[Path]:
    """Of a folder all files of the better format, or those that are named."""
    if path.is_file():
        files = [path]
    else:
        files = sorted(file for file in path.rglob("*") if file.suffix in _LOCAL and not file.name.startswith("."))
        if named and not any(file.suffix == ".parquet" for file in files):
            files = [file for file in files if file.name in named]
            if missing := set(named) - {file.name for file in files}:
                raise UserError(f"has no {', '.join(sorted(missing))}", where=str(path), expected=", ".join(named))
    parquet = [file for file in files if file.suffix == ".parquet"]
    files = parquet or [file for file in files if file.suffix in _LOCAL]
    if not files:
        raise UserError("holds no data", where=str(path), expected="parquet or JSONL files, as the hub has them")
    return files


def _transform(
    name: str, public: PublicSet, rows: Iterable[Any], days: dict[str, str | None]
) -> Iterator[dict[str, Any]]:
    first, last = days.get("since") or "", days.get("until") or "9999"
    number = 0
    seen: set[Any] = set()
    for position, row in enumerate(rows):
        try:
            if public.day and not first <= public.day(row) <= last:
                continue
            new = public.transform(row, name)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"is not as expected ({type(error).__name__}: {error})", where=f"{name}, row {position}"
            ) from None
        if new is None:
            continue
        if public.unique_prompts:
            text = json.dumps(new["prompt"])
            if text in seen:
                continue
            seen.add(text)
        # One type per column in parquet: every answer is text, and extra_info has the same keys in every row.
        new["reward_model"]["ground_truth"] = str(new["reward_model"]["ground_truth"])
        new["extra_info"] = {"index": number, "split": public.split, **new["extra_info"]}
        number += 1
        yield new
    if not number:
        raise UserError("no row is left", where=name, fix="is it the right copy?")


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """How many rows there were."""
    import pyarrow
    import pyarrow.parquet

    partial = path.with_suffix(".parquet.partial")
    number = 0
    writer = None
    try:
        for block in _blocks(rows):
            table = pyarrow.Table.from_pylist(block, schema=writer and writer.schema)
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(partial, table.schema)
            writer.write_table(table)
            number += len(block)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        if writer is not None:
            writer.close()
    os.replace(partial, path)
    return number


def _blocks(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    block: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        block.append(row)
        size += len(row["reward_model"]["ground_truth"])
        if len(block) == _BLOCK_ROWS or size > _BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _write_manifest(path: Path, facts: dict[str, Any]) -> None:
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(facts, indent=2) + "\n")
    os.replace(partial, path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
