"""The commands of `vespo-megatron`, the errors that end them, and their exit statuses."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from vespo_megatron import __version__
from vespo_megatron.cli import (
    compare,
    convert,
    data,
    doctor,
    evaluate,
    kernels,
    mismatch,
    plan,
    predict,
    preflight,
    recipe,
    replay_step,
    report,
    serve,
    simulate,
    slurm,
    train,
)
from vespo_megatron.cli.shared import split_overrides

COMMANDS = {
    "train": train,
    "eval": evaluate,
    "mismatch": mismatch,
    "recipe": recipe,
    "replay-step": replay_step,
    "serve": serve,
    "convert": convert,
    "data": data,
    "slurm": slurm,
    "compare": compare,
    "plan": plan,
    "predict": predict,
    "simulate": simulate,
    "doctor": doctor,
    "preflight": preflight,
    "report": report,
    "kernels": kernels,
}
"""Name → module with `HELP`, `add_arguments(parser)` and `run(parsed)`, in the order in which `--help` shows them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0: done. 1: a failure nobody explained. 2: `UserError`. 3: a plan that does not fit. 70: the watchdog ended a run
    that hung. 75: stopped by SIGTERM, SIGUSR1 or SIGHUP after a checkpoint, to be resumed. 128 + n: stopped by signal n
    (130 Ctrl-C, 143 SIGTERM, 141 a reader that went away).
    """
    parser = build_parser()
    overrides, others = split_overrides(parser, sys.argv[1:] if arguments is None else arguments)
    parsed, rest = parser.parse_known_args(others)
    if hasattr(parsed, "overrides"):
        parsed.overrides += overrides
        # What is none, but looks like one, is where the recipe is read: it names the nearest key.
        parsed.overrides += [text for text in rest if "=" in text and not text.startswith("-")]
        rest = [text for text in rest if text not in parsed.overrides]
    else:
        rest += overrides
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from vespo_megatron.errors import UserError
    from vespo_megatron.installed import what_to_install
    from vespo_megatron.machine_errors import explained
    from vespo_megatron.run.processes import Stopped

    try:
        return COMMANDS[parsed.command].run(parsed) or 0
    except UserError as error:
        print(f"vespo-megatron: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (said := what_to_install(parsed.command, error)) is None:
            raise
        print(f"vespo-megatron: {said}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of this command's own output: whoever read it has enough
        with suppress(OSError):  # what is still in the buffer may not fail at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if (refused := explained(error)) is None:
            raise
        print(f"vespo-megatron: {refused}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"vespo-megatron: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("vespo-megatron: stopped by SIGINT", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="vespo-megatron", description="RL training of Mixture-of-Experts models: Megatron-core, SGLang, VESPO."
    )
    parser.add_argument("--version", action="version", version=f"vespo-megatron {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP))
    return parser
