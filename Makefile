# Everything a newcomer or CI runs. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
RANKS ?= 2
TEST_JOBS ?= 3
VENV := .venv
BIN := $(VENV)/bin
SAMPLE := data/fashion-mnist
SHARDS := data/shards/fashion-mnist
RUN ?= runs/demo
TORCHRUN = OMP_NUM_THREADS=$(shell n=$$(( $$(nproc) / $(RANKS) )); echo $$(( n > 0 ? n : 1 ))) \
	$(BIN)/python -m largescale.distributed.start_ranks --standalone --nproc-per-node=$(RANKS)
# WHEELS=FOLDER installs from what `make wheels` put there, over the torch that $(PYTHON) has, without a network.
PIP_INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --upgrade-strategy only-if-needed \
	$(if $(WHEELS),--no-index --find-links '$(abspath $(WHEELS))')
CODE = largescale shards launch tests benchmarks
# What fails beside other tests is run once more by itself. A test that passes then is named: its race is to be mended.
PYTEST = $(BIN)/python -m pytest
define TESTS
@echo '$(PYTEST) $(1)'
@$(PYTEST) $(1) || { test $$? = 1 && echo 'once more, by themselves:' && \
	$(PYTEST) $(1) -n 0 -x -rp --last-failed --last-failed-no-failures none; }
endef
.DEFAULT_GOAL := help

.PHONY: help setup wheels pretrain test test-fast slurm-packages slurm-test kill-test bench gpu-check lint format types clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/installed  ## create .venv and install the package (first time: some minutes)

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(if $(WHEELS),--system-site-packages --clear) $(VENV)
ifdef WHEELS
	@test -f '$(WHEELS)/requirements.txt' || { echo "error: WHEELS=$(WHEELS): make wheels has not written this folder" >&2; exit 2; }
	@ls '$(WHEELS)'/torch-*.whl >/dev/null 2>&1 || $(BIN)/python -c 'import torch, torchvision' 2>/dev/null || { \
	echo "error: $(PYTHON) has no torch and torchvision; load your cluster's, or make PYTHON=... (docs/offline.md)" >&2; exit 2; }
endif
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/strategies: $(VENV)/installed
	$(PIP_INSTALL) -e '.[deepspeed,fairscale]'
	@touch $@

$(VENV)/with-tests: $(VENV)/installed
	$(PIP_INSTALL) -e '.[test]'
	@touch $@

$(SAMPLE)/unpacked: shards/sample/fashion-mnist.zip
	@mkdir -p data
	$(PYTHON) -m zipfile -e $< data
	@touch $@

$(SHARDS)-%/manifest.json: $(SAMPLE)/unpacked | $(VENV)/installed
	$(BIN)/shards convert $(SAMPLE)/$* $(SHARDS)-$* --labels folder --shuffle 0 --samples-per-shard 1000 --force

wheels:  ## all packages but torch in a folder, DIR=..., to install where there is no internet (docs/offline.md)
	@test -n '$(DIR)' || { echo "make wheels DIR=FOLDER [PYTHON_VERSION=3.12] [PLATFORM=linux_x86_64]" \
	"[EXTRAS=deepspeed,fairscale,s3,gs,http,test] [INCLUDE_TORCH=1]" >&2; exit 2; }
	@$(PYTHON) -m venv --clear build/wheels
	@build/wheels/bin/pip install --quiet --disable-pip-version-check packaging
	@build/wheels/bin/python -m launch.wheels '$(DIR)' $(if $(PYTHON_VERSION),--python-version '$(PYTHON_VERSION)') \
	$(if $(PLATFORM),--platform '$(PLATFORM)') $(if $(EXTRAS),--extras '$(EXTRAS)') $(if $(INCLUDE_TORCH),--include-torch)

pretrain: $(SHARDS)-train/manifest.json $(SHARDS)-test/manifest.json | $(VENV)/installed  ## the demo: images to an accuracy and a report
	$(TORCHRUN) -m largescale pretrain configs/demo.yaml run.dir=$(RUN)
	@$(BIN)/largescale evaluate knn $(RUN)
	@$(BIN)/largescale evaluate linear $(RUN)
	@$(BIN)/largescale export $(RUN) $(RUN)/backbone.safetensors
	@echo "report:  $$($(BIN)/largescale report $(RUN))"

# Tests start hundreds of processes, so what Python compiles is kept, also where the environment says otherwise.
test test-fast slurm-test: export PYTHONDONTWRITEBYTECODE :=

test: $(VENV)/strategies $(VENV)/with-tests  ## all tests: fast ones first, then distributed and fault tests
	$(call TESTS,-m "not distributed and not slow and not slurm" -n $(TEST_JOBS))
	$(call TESTS,-m "distributed or slow" -n $(TEST_JOBS) --dist worksteal)
	@if [ "$$(id -u)" = 0 ]; then $(MAKE) --no-print-directory slurm-test; \
	else echo "left out: make slurm-test, which starts a SLURM of its own and needs root"; fi

test-fast: $(VENV)/with-tests  ## tests that need one process and seconds
	$(PYTEST) -m "not distributed and not slow and not slurm"

slurm-packages:
	@if ! PATH=$$PATH:/usr/sbin command -v slurmctld munged >/dev/null; then \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge >/dev/null; fi

slurm-test: slurm-packages | $(VENV)/with-tests  ## jobs on a real SLURM of two nodes on this machine (as root; installs slurm-wlm)
	$(call TESTS,tests/slurm -m slurm)

kill-test: $(VENV)/with-tests  ## 200 kills at random moments, 20 of them of a lost machine; each run ends as the undisturbed one (about 40 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.kills --kills 200 --out benchmarks/results/kills.json

bench: $(SHARDS)-train/manifest.json $(SHARDS)-test/manifest.json | $(VENV)/installed  ## repeat the measurements in benchmarks/results
	$(BIN)/python -m benchmarks.demo
	$(BIN)/python -m benchmarks.methods
	$(BIN)/python -m benchmarks.few_labels
	$(BIN)/python benchmarks/overheads.py
	$(BIN)/python benchmarks/sinkhorn.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/stream.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/views.py
	$(BIN)/python benchmarks/soak.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/weak_scaling.py

gpu-check: | $(VENV)/strategies  ## is it right and how fast on this machine's GPU, in at most 8 minutes (docs/gpu-check.md)
	$(BIN)/python benchmarks/gpu_check.py

lint: $(VENV)/with-tests  ## style, format and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	@$(MAKE) --no-print-directory types

format: $(VENV)/with-tests  ## lay the code out as `make lint` wants it
	$(BIN)/ruff format $(CODE)

types: $(VENV)/with-tests  ## mypy over both packages (pyproject.toml says how strict)
	$(BIN)/mypy

clean:  ## remove converted data and runs (keeps .venv)
	rm -rf data runs
