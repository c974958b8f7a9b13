"""A set's rows, wherever they are: files, folders, patterns, compressed files, saved sets, sets on the hub.

Hugging Face's datasets reads them into Arrow, which stays on the disk and is mapped into memory.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vespo_megatron.errors import UserError
from vespo_megatron.recipe.schema import SetConfig

if TYPE_CHECKING:
    import datasets

LOADERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
"""What the name of a file says of its format, compression aside."""
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_KINDS = "a .parquet, .jsonl or .json file (compressed too), a folder of them, a pattern, a saved set, or owner/name"


def read(config: SetConfig, where: str) -> datasets.Dataset:
    """All rows of a set, in the order of its files.

    Args:
        where: names the set in errors.

    Raises:
        UserError: nothing is there, it cannot be read, or it has no rows.
    """
    import datasets

    datasets.disable_progress_bars()
    parts = [part for place in config.places for part in _parts(place, config, where)]
    rows = parts[0] if len(parts) == 1 else _together(parts, where)
    if len(rows) == 0:
        raise _no_rows(where)
    return rows


def stream(config: SetConfig, where: str) -> tuple[datasets.IterableDataset, list[str]]:
    """The same rows, read as they are asked for, and what they are read from. Raises `UserError` as `read`."""
    import datasets

    places = config.places
    if len(places) == 1 and _is_hub_name(places[0]):
        rows = _hub(places[0], config, streaming=True)
        return rows, [f"{places[0]}@{config.revision}"]
    files = [file for place in places for file in _files(place, where)]
    kinds = {LOADERS[_suffix(file)] for file in files}
    if len(kinds) > 1:
        raise UserError(f"is read from {' and '.join(sorted(kinds))} files", where=where, expected="one kind")
    names = [str(file) for file in files]
    rows = datasets.load_dataset(kinds.pop(), data_files=names, split="train", streaming=True)
    return rows, [f"{file}:{file.stat().st_size}" for file in files]


def missing(config: SetConfig) -> str | None:
    """The first place that is surely not there; None where all are, or may be on the hub."""
    for place in config.places:
        if not (
            Path(place).exists() or _is_hub_name(place) or (glob.has_magic(place) and glob.glob(place, recursive=True))
        ):
            return place
    return None


def _parts(place: str, config: SetConfig, where: str) -> Iterator[datasets.Dataset]:
    import datasets

    folder = Path(place)
    if (folder / "dataset_dict.json").is_file():
        saved = _loaded(folder, lambda: datasets.load_from_disk(place))
        if config.split not in saved:
            raise UserError(
                f"has no split {config.split!r}",
                where=place,
                expected=f"one of {', '.join(saved)}",
                fix="set its split",
            )
        yield saved[config.split]
    elif (folder / "state.json").is_file():
        yield _loaded(folder, lambda: datasets.load_from_disk(place))
    elif _is_hub_name(place):
        yield _hub(place, config, streaming=False)
    else:
        yield from (_file(file) for file in _files(place, where))


def _files(place: str, where: str) -> list[Path]:
    """Of a file, a folder or a pattern, in order."""
    path = Path(place)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) in LOADERS)
        if not found:
            raise UserError("holds no data", where=place, expected="files that end in " + ", ".join(LOADERS))
        return found
    if glob.has_magic(place) and not path.is_file():
        found = sorted(Path(name) for name in glob.glob(place, recursive=True) if Path(name).is_file())
        if not found:
            raise UserError("no file is like that", where=place, expected="a pattern that files fit", fix=_CHECK)
        path = found[0]
    else:
        found = [path]
    for file in found:
        if _suffix(file) not in LOADERS:
            raise UserError(f"{file.name!r} is no dataset", where=where, expected=_KINDS)
        if not file.is_file():
            raise UserError("does not exist", where=str(file), expected="a dataset file", fix=_CHECK)
    return found


_CHECK = "check the data section"


def _suffix(file: Path) -> str:
    name = file.with_suffix("") if file.suffix in _COMPRESSED else file
    return name.suffix


def _is_hub_name(place: str) -> bool:
    return not Path(place).exists() and bool(_HUB_NAME.fullmatch(place)) and _suffix(Path(place)) not in LOADERS


def _file(path: Path) -> datasets.Dataset:
    import datasets

    if _is_empty(path):  # datasets' own words for it name neither the file nor the matter
        raise _no_rows(str(path))
    kind = LOADERS[_suffix(path)]
    return _loaded(path, lambda: datasets.load_dataset(kind, data_files=str(path), split="train"))


def _loaded(path: Path, load):  # type: ignore[no-untyped-def]
    try:
        return load()
    except Exception as error:  # datasets wraps every parser's own exceptions
        cause = error.__cause__ or error
        if (elsewhere := _outside(path, error)) is not None:
            raise elsewhere from None
        expected = f"a {path.suffix} file with rows" if path.suffix else "a set that datasets saved"
        raise UserError(f"cannot be read ({cause})", where=str(path), expected=expected) from None


def _hub(name: str, config: SetConfig, *, streaming: bool):  # type: ignore[no-untyped-def]
    import datasets

    try:
        return datasets.load_dataset(
            name, config.subset, split=config.split, revision=config.revision, streaming=streaming
        )
    except Exception as error:  # the hub's, the network's, and datasets' own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"is neither here nor on the hub ({reason})",
            where=name,
            expected=_KINDS,
            fix="check name, subset, split and revision; without a network there is what datasets has in its cache",
        ) from None


def _together(parts: Sequence[datasets.Dataset], where: str) -> datasets.Dataset:
    import datasets

    try:
        return datasets.concatenate_datasets(list(parts))
    except Exception as error:
        raise UserError(
            f"its files have other columns than each other ({str(error).splitlines()[0]})",
            where=where,
            expected="files of one kind; others are sets of their own, data.train.sets",
        ) from None


def _no_rows(where: str) -> UserError:
    return UserError("has no rows", where=where, expected="at least one prompt")


def _outside(path: Path, error: BaseException | None) -> UserError | None:
    """What `datasets` met in its cache, which is no fault of the data."""
    while error is not None:
        if isinstance(error, OSError) and error.filename and not _is_within(str(error.filename), path):
            return UserError(
                f"cannot be written ({error.strerror})",
                where=f"the cache of Hugging Face's datasets, {error.filename}",
                fix="set HF_HOME or HF_DATASETS_CACHE to a folder that this user can write",
            )
        error = error.__cause__ or error.__context__
    return None


def _is_within(name: str, path: Path) -> bool:
    return Path(name) == path or path in Path(name).parents


def _is_empty(path: Path) -> bool:
    """Whether there is surely no row in it; a damaged or compressed file is left to the parser's own message."""
    if path.suffix in _COMPRESSED:
        return False
    if path.suffix != ".parquet":
        with path.open("rb") as file:
            return not any(line.strip() for line in file)
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(path).num_rows == 0
    except (pyarrow.ArrowException, OSError):
        return False
