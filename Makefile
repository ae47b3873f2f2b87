# Every target sets up .venv by itself. Override with e.g. `make venv PYTHON=python3.12 ACCELERATOR=cpu`.

PYTHON      ?= python3
ACCELERATOR ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
VENV        := .venv
PY          := $(VENV)/bin/python
INSTALL     := $(PY) -m pip install -qq --disable-pip-version-check
TORCH       := $(shell sed -n 's/^torch==//p' requirements/$(ACCELERATOR).txt)
# The number of test files that run at the same time.
WORKERS     ?= 1
# One at a time: unit tests first, which say the most in the least time. Several: long files first, so that all end together.
UNIT_FIRST  := tests/unit tests/ray tests/chaos tests/page tests/gpu
LONG_FIRST  := tests/chaos tests/ray tests/page tests/gpu tests/unit
TESTS       := $(wildcard $(if $(filter 1,$(WORKERS)),$(UNIT_FIRST),$(LONG_FIRST)))
ARGS        ?=
SUDO        := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.DEFAULT_GOAL := help
.PHONY: help venv demo test page-test chaos graph-chaos bench-graph bench-recovery lint clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 22

venv: $(VENV)/.installed ## create .venv with every pinned dependency (once; again when they change)

# Kills one rank in the middle of pretraining; the terminal shows the detection, the decision and the pause.
DEMO_FAULTS ?= pretrain.generation-1.rank-1.step:120=kill

demo: $(VENV)/.installed ## the whole graph on this machine, CPU is enough; ARGS="--set seed=2" passes options on
	RECUA_FAULTS=$(DEMO_FAULTS) $(VENV)/bin/recua run workflows/llama3_posttrain.py --recipe recipes/tiny.toml --store $(CURDIR)/runs/store $(ARGS)

test: lint ## lint, types, import rules, then every test; the last line is pytest's summary
	@echo "==> types (mypy)"
	@$(VENV)/bin/mypy
	@echo "==> import rules (import-linter)"
	@$(VENV)/bin/lint-imports
	@echo "==> tests: $(TESTS)"
	@$(PY) -m pytest $(if $(filter-out 1,$(WORKERS)),--numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder) $(TESTS) $(ARGS)

chaos: $(VENV)/.installed ## random faults on elastic pretraining over four raylets; ARGS="--faults 300" or "--for 10m"; SEED=n replays
	@$(PY) -m tests.chaos.elastic_campaign $(ARGS)

graph-chaos: $(VENV)/.installed ## random faults on a 50-step graph, RUNS=20 of them; SEED=n replays one run
	@$(PY) -m tests.chaos.campaign $(if $(RUNS),--runs $(RUNS)) $(ARGS)

page-test: $(VENV)/.installed ## the service's page in headless Chromium, which apt installs if it is missing (Debian)
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { echo "==> installing chromium"; $(SUDO) apt-get update -qq && \
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; }
	@$(PY) -m pytest tests/page $(ARGS)

lint: $(VENV)/.installed ## ruff: rules and formatting
	@echo "==> lint (ruff)"
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

bench-graph: $(VENV)/.installed ## 10,000 durable steps against bare Ray and Prefect; ARGS="--peers none" skips Prefect
	@$(PY) -m bench.graph $(ARGS)

bench-recovery: $(VENV)/.installed ## pauses after a SIGKILL against torchft, Ray Train, torchrun; ARGS="--cases shrink,torchft"
	@$(PY) -m bench.recovery $(ARGS)

clean: ## remove caches and build outputs; keeps .venv and runs/
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: $(VENV)/.requirements pyproject.toml
	@echo "==> installing recua itself into $(VENV)"
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@
	@echo "==> ready: $(VENV)/bin/recua --help"

$(VENV)/.requirements: requirements/pip.txt requirements/$(ACCELERATOR).txt requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "recua needs Python 3.11 or newer; \
	$(PYTHON) is $$($(PYTHON) --version 2>&1). Name another one: make venv PYTHON=python3.11" >&2; exit 1; }
	@echo "==> filling $(VENV) for $(ACCELERATOR) with $$($(PYTHON) --version); the downloads take 2 to 4 minutes, once"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot create a virtual environment (on Debian: apt install python3-venv)" >&2; exit 1; }
	@$(INSTALL) -r requirements/pip.txt
	@echo "==> installing torch $(TORCH) ($(ACCELERATOR))"
	@$(MAKE) --no-print-directory torch-$(ACCELERATOR)
	@echo "==> installing $$(cat requirements/$(ACCELERATOR).txt requirements/dev.txt | grep -c ==) pinned packages"
	@$(INSTALL) --no-deps -r requirements/$(ACCELERATOR).txt -r requirements/dev.txt
	@touch $@

.PHONY: torch-cpu torch-gpu
# The CPU build from pip's configured index; from PyTorch's own index only if that one has none.
torch-cpu:
	@$(INSTALL) --no-deps torch==$(TORCH)+cpu 2>/dev/null \
	|| $(INSTALL) --no-deps torch==$(TORCH)+cpu --index-url https://download.pytorch.org/whl/cpu

torch-gpu:
	@$(INSTALL) --no-deps torch==$(TORCH)
