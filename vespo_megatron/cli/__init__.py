"""The command line: a module per command, its options and what it does side by side.

Whatever is heavy is imported by the command that needs it, when it runs: `--help` waits for nothing.
"""

from vespo_megatron.cli.command_line import build_parser, main

__all__ = ["build_parser", "main"]
