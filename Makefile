# make setup      .venv with everything, at the versions of constraints.txt (Python >= 3.11 and a C compiler are enough)
# make demo       draw data, train a small model end to end, write runs/demo/report.html
# make chat       a page to ask the demo's model about pictures, after make demo
# make test       every test            make test-fast   without worker processes and launchers
# make lint       ruff and mypy         make format      let ruff rewrite
# make slurm-up   a throw-away Slurm cluster on this machine to try slurm/*.sbatch on       make slurm-down

SHELL := bash
BIN := $(CURDIR)/.venv/bin
# The deepspeed launcher starts `python`, and DeepSpeed's JIT looks for `ninja`: both must be the ones of .venv.
export PATH := $(BIN):$(PATH)
# Tests use small tensors and several processes: more threads only wait for each other.
test test-fast: export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo chat test test-fast lint format slurm-up slurm-down

help:
	@sed -n 's/^# make/make/p' Makefile

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@python=; for candidate in python3.11 python3.12 python3.13 python3; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "error: Python 3.11 or newer is needed; none of python3.11, python3.12, python3.13, python3 is." >&2; exit 2; fi; \
	if [ ! -x .venv/bin/python ]; then echo "making .venv with $$("$$python" --version)"; "$$python" -m venv .venv; fi
	@echo "installing PyTorch, then everything else, at the versions of constraints.txt (some minutes, once)"
	@.venv/bin/python -m pip install --quiet -c constraints.txt torch
	@.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,gpu,mpi,eval,analysis]'
	@touch $@
	@echo "ready: .venv"

demo: setup
	python tools/demo.py

chat: setup
	python tools/demo_page.py runs/demo/sft

# Half of the suite's time is waiting (Slurm, killed and hanging ranks), so more workers than cores. Tests that share the
# pool of ranks or the Slurm cluster run on one worker (tests/conftest.py). A worker that dies fails the run: xdist would
# wait for ever for one that it starts again.
TEST_WORKERS ?= 3
PYTEST := python -m pytest -n $(TEST_WORKERS) --no-loadscope-reorder --max-worker-restart 0

test: setup
	$(PYTEST)

test-fast: setup
	$(PYTEST) -m "not distributed and not end_to_end and not slurm"

lint: setup
	ruff check .
	ruff format --check .
	mypy

format: setup
	ruff check --fix .
	ruff format .

# Below build/, which git ignores. docs/cluster.md goes on from here.
SLURM_FOLDER := $(CURDIR)/build/slurm

slurm-up: setup
	@slurm/cluster.sh up $(SLURM_FOLDER)
	@echo "then, for example, the second stage of the demo (make demo) on two nodes with one rank each:"
	@echo "  AKI_CONFIG=configs/demo/sft.yaml AKI_RUN=runs/slurm sbatch --nodes 2 --ntasks-per-node 1 slurm/sft_aki4b.sbatch"
	@echo "  squeue; python tools/status.py runs/slurm"
	@echo "and at last: make slurm-down"

slurm-down:
	@slurm/cluster.sh down $(SLURM_FOLDER)
