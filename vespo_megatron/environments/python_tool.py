"""A Python tool: the program of a turn runs behind the code reward's wall, and what it prints is read next."""

from __future__ import annotations

from vespo_megatron.data.prompt_set import PromptRecord
from vespo_megatron.environments.protocol import Step, Turn
from vespo_megatron.rewards.code import choose_wall
from vespo_megatron.rewards.programs import last_program, prepare
from vespo_megatron.rewards.sandbox import Limits, run

_PROGRAM = """
try:
    exec(compile({source!r}, "program", "exec"), {{"__name__": "__main__"}})
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}")
    raise SystemExit(1)
"""


class PythonTool:
    """Runs the last fenced block of Python of a turn; a turn without one ends the episode.

    Every program starts anew: nothing but what it prints is left of it. An exception is printed as its type and text,
    and a program that fails or goes beyond a bound counts as a tool error.

    Args:
        seconds: for one program.
        memory_mb: memory of a program, in MiB.
        max_characters: of what it prints; the middle of what is longer is left out.
        role: of the message that holds it.
        allow_unsafe_code: run programs with all that this process may do where nothing fences them.

    Raises:
        UserError: nothing here fences a program (`wall.find_wall`).
    """

    def __init__(
        self,
        *,
        seconds: float = 5.0,
        memory_mb: int = 1024,
        max_characters: int = 2000,
        role: str = "tool",
        allow_unsafe_code: bool = False,
    ) -> None:
        self.limits, self.max_characters, self.role = Limits(seconds, memory_mb), max_characters, role
        self.wall = choose_wall(allow_unsafe_code=allow_unsafe_code)

    def reset(self, record: PromptRecord) -> None:
        """The record's prompt."""

    def step(self, turn: Turn) -> Step:
        """See `Environment.step`."""
        program = last_program(turn.text)
        if program is None:
            return Step("", done=True)
        ended = run(_PROGRAM.format(source=prepare(program, as_main=True)), "", self.limits, self.wall)
        printed = self._shortened(ended.printed.rstrip("\n"))
        if ended.status is None:
            printed = f"{printed}\nended after {self.limits.seconds:g} s or {self.limits.memory_mb} MiB".lstrip("\n")
        return Step(
            [{"role": self.role, "content": printed or "(nothing was printed)"}], tool_errors=int(ended.status != 0)
        )

    def _shortened(self, printed: str) -> str:
        half = self.max_characters // 2
        return printed if len(printed) <= self.max_characters else f"{printed[:half]}\n…\n{printed[-half:]}"
