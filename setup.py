"""Package metadata. Pinned sets that were run together are in requirements/; extras here say what a feature needs.

Without an extra it is `vespo_megatron.losses`, which needs torch and NumPy; `train` is everything that the command line
imports, and whatever trains includes it.

NVIDIA Apex is never a dependency: PyPI's `apex` is an unrelated Pyramid toolkit. SGLang's own requirements pin a CUDA
torch, so `sglang-cpu` lists what its server needs on a CPU, and SGLang itself is installed without dependencies:
`pip install --no-deps -r requirements/sglang-cpu.txt`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "vespo_megatron" / "__init__.py").read_text())[1]

EXTRAS = {
    "train": [
        "aiohttp",
        "annotated-types",
        "datasets>=5",
        "jinja2",
        "math-verify==0.9.0",
        "matplotlib",
        "megatron-core==0.16.1",
        "omegaconf>=2.3",
        "packaging",
        "psutil",
        "pyarrow",
        "pydantic>=2",
        "pyinstrument",
        "pyyaml",
        "requests",
        "safetensors",
        "scipy",
        "sympy",
        "tensorboard",
        "tqdm",
        "transformers>=5",
        "urllib3",
        "xxhash",
    ],
    "sglang-cpu": [
        "aiohttp",
        "apache-tvm-ffi==0.1.11",
        "compressed-tensors==0.18.0",
        "dill",
        "distro",
        "einops",
        "fastapi",
        "gguf",
        "httpx",
        "interegular",
        "ipython",
        "jsonschema",
        "llguidance<2",
        "loguru",
        "msgspec",
        "openai==2.8.0",
        "orjson",
        "packaging",
        "partial-json-parser",
        "pillow",
        "prometheus-client",
        "psutil",
        "pybase64",
        "pydantic",
        "python-multipart",
        "pyzmq",
        "regex",
        "requests",
        "scipy",
        "sentencepiece",
        "setproctitle",
        "soundfile",
        "tiktoken",
        "triton",
        "uvicorn",
        "uvloop",
        "watchfiles",
        "xgrammar==0.2.7",
        "xxhash",
        "zstandard",
    ],
    # The bare transformer-engine imports with a RuntimeError that megatron-core does not catch.
    "te": ["vespo-megatron[train]", "transformer-engine[pytorch,core_cu12]>=2.9,<2.12"],
    "nemo": ["vespo-megatron[train]", "nemo-toolkit[core]==3.0.0", "einops", "sentencepiece", "pandas"],
    "dev": [
        "vespo-megatron[train]",
        "accelerate",
        "atheris",
        "hypothesis",
        "import-linter",
        "jsonschema",
        "mypy",
        "pytest>=8",
        "pytest-timeout",
        "ruff",
        "vulture",
    ],
    "bench": ["vespo-megatron[train]", "trl==1.16.0"],
}

setup(
    name="vespo-megatron",
    version=VERSION,
    description="RL training of Mixture-of-Experts models: Megatron-core trains, SGLang generates, VESPO corrects",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["vespo_megatron", "vespo_megatron.*"]),
    package_data={
        "vespo_megatron": ["py.typed", "rollout_sglang/plugin/stubs/**/*.py", "study/templates/*", "slurm/templates/*"]
    },
    install_requires=[
        "numpy",
        "torch>=2.10",  # addmm(out_dtype=) takes a float32 sum to add to (pytorch #167931)
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["vespo-megatron = vespo_megatron.cli:main"],
        # SGLang loads these in its own processes: the CPU platform (it stands aside where CUDA is present) and the
        # checksum of its weights.
        "sglang.srt.platforms": ["vespo_cpu = vespo_megatron.rollout_sglang.plugin.cpu_platform:activate"],
        "sglang.srt.plugins": ["vespo_weights = vespo_megatron.rollout_sglang.plugin.weights:register"],
    },
)
