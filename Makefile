# Everything a newcomer or CI runs. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
RANKS ?= 2
TEST_JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
SAMPLE := data/fashion-mnist
SHARDS := data/shards/fashion-mnist
RUN ?= runs/demo
TORCHRUN = OMP_NUM_THREADS=$(shell n=$$(( $$(nproc) / $(RANKS) )); echo $$(( n > 0 ? n : 1 ))) \
	$(BIN)/torchrun --standalone --nproc-per-node=$(RANKS)
.DEFAULT_GOAL := help

.PHONY: help setup pretrain test test-fast slurm-packages slurm-test kill-test bench gpu-check lint clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(VENV)/installed  ## create .venv and install the package (first time: some minutes)

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade-strategy only-if-needed -e '.[test]'
	@touch $@

$(VENV)/strategies: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade-strategy only-if-needed -e '.[deepspeed,fairscale]'
	@touch $@

$(SAMPLE)/unpacked: shards/sample/fashion-mnist.zip
	@mkdir -p data
	$(PYTHON) -m zipfile -e $< data
	@touch $@

$(SHARDS)-%/manifest.json: $(SAMPLE)/unpacked | $(VENV)/installed
	$(BIN)/shards convert $(SAMPLE)/$* $(SHARDS)-$* --labels folder --shuffle 0 --samples-per-shard 1000 --force

pretrain: $(SHARDS)-train/manifest.json $(SHARDS)-test/manifest.json | $(VENV)/installed  ## the demo: images to an accuracy and a report
	$(TORCHRUN) -m largescale pretrain configs/demo.yaml run.dir=$(RUN)
	@$(BIN)/largescale evaluate knn $(RUN)
	@$(BIN)/largescale evaluate linear $(RUN)
	@echo "report:  $$($(BIN)/largescale report $(RUN))"

test: $(VENV)/strategies  ## all tests: fast ones first, then distributed and fault tests
	$(BIN)/python -m pytest -m "not distributed and not slow and not slurm" -n $(TEST_JOBS)
	$(BIN)/python -m pytest -m "distributed or slow" -n $(TEST_JOBS) --dist worksteal
	@if [ "$$(id -u)" = 0 ]; then $(MAKE) --no-print-directory slurm-test; \
	else echo "left out: make slurm-test, which starts a SLURM of its own and needs root"; fi

test-fast: $(VENV)/installed  ## tests that need one process and seconds
	$(BIN)/python -m pytest -m "not distributed and not slow and not slurm"

slurm-packages:
	@if ! PATH=$$PATH:/usr/sbin command -v slurmctld munged >/dev/null; then \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge >/dev/null; fi

slurm-test: slurm-packages | $(VENV)/installed  ## jobs on a real SLURM of two nodes on this machine (as root; installs slurm-wlm)
	$(BIN)/python -m pytest -m slurm

kill-test: $(VENV)/installed  ## 100 kills at random moments, each run ends as the undisturbed one (about 25 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.kills --kills 100 --out benchmarks/results/kills.json

bench: $(SHARDS)-train/manifest.json $(SHARDS)-test/manifest.json | $(VENV)/installed  ## repeat the measurements in benchmarks/results
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/sinkhorn.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/stream.py
	$(BIN)/python benchmarks/soak.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/weak_scaling.py

gpu-check: | $(VENV)/strategies  ## is it right and how fast on this machine's GPU, in at most 8 minutes (docs/gpu-check.md)
	$(BIN)/python benchmarks/gpu_check.py

lint: $(VENV)/installed  ## style checks
	$(BIN)/ruff check largescale shards tests benchmarks

clean:  ## remove converted data and runs (keeps .venv)
	rm -rf data runs
