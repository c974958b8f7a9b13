# Linux, Python 3.11 or newer and a network for the first time; no GPU.
#
#   make train   install into .venv, make the tiny example, train it (ARGS="grpo.seed=7" overrides the recipe)
#   make calculator     the small example with a tool: trains it to call a calculator, beside training too
#   make test    install into .venv, run every test (PYTEST_ARGS="tests/recipe -x" for some of them)
#   make nightly        what takes minutes or hours: test-nightly, properties, fuzz, study-smoke
#   make test-nightly   the slow tests: 5,000 steps, twenty kills, every 30B recipe scaled down
#   make properties     two thousand examples for every property
#   make fuzz           ten minutes of each fuzzer (FUZZ_SECONDS)
#   make study-smoke    a small staleness study, held to what has always held
#   make test-slurm     jobs on a real SLURM of four virtual nodes; as root on Debian or Ubuntu, installs slurm-wlm
#   make test-sandbox   programs against their wall; as root on Debian or Ubuntu, installs bubblewrap
#   make test-browser   reports in headless Chromium; as root on Debian or Ubuntu, installs chromium
#   make test-nemo      the real nemo-toolkit runs our recipes; installs it into .venv-nemo, which falls back on .venv
#   make test-wheel     the wheel in an empty environment, by pip from an index: torch and NumPy, none of the stack
#   make test-triton    GPU kernels in Triton's interpreter, and compiled for an H100; installs Triton (285 MB)
#   make test-gpu       what a GPU shows, on a machine that has one (benchmarks/gpu_day.py runs it too)
#   make lint    ruff, its format, types (mypy), dead code (vulture), import contracts; each a target of its own
#   make venv    install only

VENV ?= .venv
BIN := $(VENV)/bin
NEMO := .venv-nemo
STAMP := $(VENV)/.installed
EXAMPLE := examples/tiny_moe
# What `make train` trains: the model_type of a tiny model, as make train FAMILY=olmoe (docs/models.md).
FAMILY ?= qwen3_moe
BUILD := $(EXAMPLE)/build$(patsubst %,_%,$(filter-out qwen3_moe,$(FAMILY)))
RECIPE := $(EXAMPLE)/$(if $(filter llama qwen3,$(FAMILY)),dense,vespo).yaml
# The first Python that is new enough and can make virtual environments; PYTHON=… chooses another.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& echo $$python && break; done)
# Options for the installation of torch alone, for instance an index whose build brings no CUDA libraries.
TORCH_OPTIONS ?=
FUZZ_SECONDS ?= 600
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input

.PHONY: train calculator test test-nightly test-slurm test-sandbox test-browser test-nemo test-wheel test-triton test-gpu nightly properties fuzz study-smoke lint ruff format types dead-code imports venv example clean
.DELETE_ON_ERROR:

train: example
	$(BIN)/vespo-megatron train $(RECIPE) policy.model_name=$(BUILD)/model $(ARGS)

calculator: $(STAMP)
	$(BIN)/python $(EXAMPLE)/prepare_calculator.py --output $(EXAMPLE)/build_calculator
	$(BIN)/vespo-megatron train $(EXAMPLE)/calculator.yaml $(ARGS)
	$(BIN)/vespo-megatron train $(EXAMPLE)/calculator.yaml grpo.async_grpo.enabled=true $(ARGS)

test: example
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-nightly: example
	$(BIN)/python -m pytest -m nightly $(PYTEST_ARGS)

test-slurm: example
	command -v slurmctld >/dev/null || (apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends slurm-wlm munge)
	$(BIN)/python -m pytest -m slurm tests/slurm

test-sandbox: example
	command -v bwrap >/dev/null || (apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends bubblewrap)
	$(BIN)/python -m pytest tests/rewards tests/data/test_public_sets.py tests/data/test_code_sets.py \
		tests/launch/test_prepared_code.py tests/launch/test_evaluate_table.py tests/launch/test_preflight.py \
		$(PYTEST_ARGS)

test-browser: example
	command -v chromium >/dev/null || (apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends chromium)
	$(PIP) --no-deps playwright==1.65.2 greenlet==3.5.6 pyee==13.0.1
	$(BIN)/python -m pytest -m browser tests/browser

test-nemo: example $(NEMO)/.installed
	$(NEMO)/bin/python -m pytest -m nemo tests/nemo

$(NEMO)/.installed: requirements/nemo.txt $(STAMP)
	$(BIN)/python -m venv --clear $(NEMO)
	$(NEMO)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/nemo.txt
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
		> "$$($(NEMO)/bin/python -c 'import site; print(site.getsitepackages()[0])')/zz_base.pth"
	touch $@

test-wheel: $(STAMP)
	$(BIN)/python -m pytest -m wheel tests/packaging

test-triton: $(STAMP)
	$(PIP) --no-deps triton==3.9.0
	$(BIN)/python -m pytest -m triton tests/losses tests/parallel

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m "cuda or not cuda" tests/gpu $(PYTEST_ARGS)

nightly: test-nightly properties fuzz study-smoke

# Only the tests of properties: the others do not change with the number of examples.
properties: example
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest --timeout=1800 --hypothesis-show-statistics \
		$$(grep -rlE '^@given' tests) $(PYTEST_ARGS)

study-smoke: example
	$(BIN)/python -m pytest -m smoke tests/study $(PYTEST_ARGS)

# What a fuzzer finds is a crash-* file here; the fuzzer takes it as its argument to run it again.
fuzz: $(STAMP)
	for parser in reply recipe; do \
		mkdir -p .fuzz/$$parser && $(BIN)/python tests/fuzz/fuzz_$$parser.py \
		-max_total_time=$(FUZZ_SECONDS) -max_len=1024 .fuzz/$$parser || exit 1; done

# `make lint` of one tool: ruff, format, types, dead-code or imports (as .pre-commit-config.yaml runs them).
lint: ruff format types dead-code imports

ruff: $(STAMP)
	$(BIN)/ruff check .

format: $(STAMP)
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

dead-code: $(STAMP)
	$(BIN)/vulture

imports: $(STAMP)
	$(BIN)/lint-imports --no-cache

venv: $(STAMP)

example: $(STAMP)
	$(BIN)/python $(EXAMPLE)/prepare.py --family $(FAMILY) --output $(BUILD)

$(STAMP): requirements/torch.txt requirements/cpu.txt requirements/sglang-cpu.txt setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer with venv and ensurepip was found" \
		"(Debian, Ubuntu: apt install python3-venv), or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_OPTIONS) -r requirements/torch.txt
	$(PIP) -r requirements/cpu.txt
	$(PIP) --no-deps -r requirements/sglang-cpu.txt
	$(PIP) --editable '.[train]'  # all of it pinned above
	touch $(STAMP)

clean:
	rm -rf $(EXAMPLE)/build $(EXAMPLE)/build_calculator .fuzz .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
