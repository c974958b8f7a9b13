"""Package metadata; SGLang finds its CPU platform and the weight checksum through the entry points."""

from setuptools import find_packages, setup

setup(
    name="vespo-megatron",
    version="0.1.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vespo_megatron", "vespo_megatron.*"]),
    package_data={"vespo_megatron.rollout_sglang": ["stubs/**/*.py"]},
    entry_points={
        "sglang.srt.platforms": ["vespo_cpu = vespo_megatron.rollout_sglang.cpu_platform:activate"],
        "sglang.srt.plugins": ["vespo_weights = vespo_megatron.rollout_sglang.server_weights:register"],
    },
)
