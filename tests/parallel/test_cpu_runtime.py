"""The CPU runtime is in place before megatron-core is imported, whichever module of the package comes first."""

import subprocess
import sys

import pytest

PROGRAM = """
import importlib, sys
from vespo_megatron.megatron import cpu_runtime

install, found = cpu_runtime.install, []

def look_and_install():
    found.append([name for name in sys.modules if name.startswith("megatron.core")])
    install()

cpu_runtime.install = look_and_install
importlib.import_module("vespo_megatron.megatron." + sys.argv[1])
assert "megatron.core" in sys.modules and found and found[0] == [], found
"""


@pytest.mark.parametrize("module", ["policy", "model", "micro_batch", "hf_weights", "checkpoint", "native.attention"])
def test_the_runtime_is_installed_before_megatron_core_is_imported(module):
    done = subprocess.run([sys.executable, "-c", PROGRAM, module], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
