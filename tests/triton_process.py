"""Triton on a machine without a GPU, in processes of their own: interpreted, or compiled for an absent GPU."""

from __future__ import annotations

import os
import subprocess
import sys


def interpret(code: str) -> None:
    """Run `code` with kernels interpreted; that must be chosen before Triton is imported."""
    _run(code, TRITON_INTERPRET="1")


def compile_for_h100(module: str, kernels: list[tuple[str, dict[str, str], dict[str, object]]], cache: str) -> None:
    """Compile kernels of `module` down to an H100's machine code.

    Args:
        kernels: name, types of its arguments (in Triton's notation), values of its constants; a dtype is a constant
            named by its string.
        cache: a folder for what is compiled.
    """
    code = (
        "import importlib, triton\n"
        "from triton.backends.compiler import GPUTarget\n"
        "from triton.compiler import ASTSource\n"
        f"module = importlib.import_module({module!r})\n"
        f"for name, types, constants in {kernels!r}:\n"
        "    kernel = getattr(module, name)\n"
        "    constants = {key: getattr(triton.language, value) if isinstance(value, str) else value\n"
        "                 for key, value in constants.items()}\n"
        "    types = types | dict.fromkeys(constants, 'constexpr')\n"
        "    source = ASTSource(kernel, {key: types[key] for key in kernel.arg_names}, constants)\n"
        "    assert triton.compile(source, target=GPUTarget('cuda', 90, 32)).asm['cubin']\n"
    )
    _run(code, TRITON_CACHE_DIR=cache)


def _run(code: str, **variables: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
