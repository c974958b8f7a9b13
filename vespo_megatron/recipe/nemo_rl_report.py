"""`vespo-megatron recipe check --from nemo-rl`: every key of their recipe, by what it is here."""

from __future__ import annotations

from pathlib import Path

from vespo_megatron.errors import UserError
from vespo_megatron.outputs import check_file, written
from vespo_megatron.recipe.loader import save_recipe
from vespo_megatron.recipe.nemo_rl import DIFFERS, IGNORED, REFUSED, RENAMED, SAME, UNKNOWN, Finding, translate

_HEADINGS = {
    SAME: "carries over",
    RENAMED: "has another name here",
    DIFFERS: "carries over with a difference",
    IGNORED: "has no meaning here",
    REFUSED: "changes training there and is not supported here",
    UNKNOWN: "is not known",
}


def check(path: str | Path, output: str | Path | None = None) -> str:
    """The listing; writes what carries over to `output`, where one is given.

    Raises:
        UserError: the file cannot be read, or has keys that would change training and cannot be had here or are not
            known (the listing is printed before); `output` cannot be written.
    """
    if output is not None:
        check_file(output, "--output")
    recipe, findings = translate(path)
    text = listing(findings)
    lost = [finding.key for finding in findings if finding.kind in (REFUSED, UNKNOWN)]
    if lost:
        print(text)
        raise UserError(
            f"{len(lost)} of {len(findings)} keys do not carry over: {', '.join(lost)}",
            where=str(path),
            fix="set them to what is supported, or take them out",
        )
    if output is not None:
        with written(output, "--output"):
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, output)
    return text


def listing(findings: list[Finding]) -> str:
    """Every key once, under what it is here."""
    lines = []
    for kind, heading in _HEADINGS.items():
        some = [finding for finding in findings if finding.kind == kind]
        if some:
            lines += ["", f"{heading} ({len(some)}):"]
            lines += [f"  {f.key}: {f.value!r}" + (f"  -> {f.note}" if f.note else "") for f in some]
    counts = ", ".join(f"{sum(f.kind == kind for f in findings)} {kind}" for kind in _HEADINGS)
    return "\n".join([*lines[1:], "", f"{len(findings)} keys: {counts}"])
