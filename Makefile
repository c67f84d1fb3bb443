# Each target sets up what it needs: a .venv with the versions of constraints.txt.
PYTHON ?= python3
CORES ?= 2
REPEAT ?= 20
BIN = .venv/bin
SHELL = /bin/bash

.PHONY: help demo test test-fast test-slurm stress-slurm lint format bench-tally bench-cohort bench-coverage bench-sample bench-allocation bench-dag clean

help:
	@echo "make demo       draw a demo cohort, train small networks, evaluate them (about 10 minutes on 2 cores)"
	@echo "make test       all tests;  make test-fast: the inner loop, under 2 minutes"
	@echo "make test-slurm      the workflow and its faults on a real SLURM, started for it; make stress-slurm REPEAT=20"
	@echo "make lint       ruff, snakefmt, snakemake --lint;  make format: let them mend what they can"
	@echo "make bench-sample    time Monte Carlo passes of a full-size patient beside a loop with MONAI"
	@echo "make bench-tally     time the tally of a full-size patient beside scikit-learn and torchmetrics"
	@echo "make bench-cohort    time cohorts of up to 10,000 patients (fills 5 GB of tallies in a temporary folder)"
	@echo "make bench-allocation  how busy GPUs are in one allocation, with warm workers and without"
	@echo "make bench-dag       time dry runs and runs with nothing to do, for up to 10,000 patients"
	@echo "make bench-coverage  how often intervals hold the truth, in simulated cohorts"
	@echo "make clean      remove the demo's data and results"

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("segtrust needs Python 3.11 or newer; try make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint,slurm,openvino]'
	touch $@

demo: .venv/ready
	test -e demo/patients.tsv || $(BIN)/segtrust phantom demo --patients 30 --shape 64 72 56 --seed 1 --train 16 --validation 4
	$(BIN)/segtrust run . --profile local --cores $(CORES) --set-threads train=1  # trainings side by side
	@echo "Report: results/report/index.html    Tables: results/<model>/cohort/"

test: .venv/ready
	$(BIN)/python -m pytest -n $(CORES) --dist worksteal --ignore=tests/slurm

test-fast: .venv/ready
	$(BIN)/python -m pytest -n $(CORES) --dist worksteal -m 'not slow' --ignore=tests/slurm

test-slurm: .venv/ready
	$(BIN)/python -m pytest tests/slurm -m 'not stress' --durations=5

stress-slurm: .venv/ready
	SEGTRUST_REPEAT=$(REPEAT) $(BIN)/python -m pytest tests/slurm/test_faults.py -n $(CORES)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/python -m pytest -q tests/test_lint.py

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

bench-tally: .venv/ready
	$(BIN)/python benchmarks/tally.py

bench-cohort: .venv/ready
	$(BIN)/python benchmarks/cohort.py

bench-coverage: .venv/ready
	$(BIN)/python benchmarks/coverage.py

bench-sample: .venv/ready
	$(BIN)/python benchmarks/sample.py

bench-allocation: .venv/ready
	$(BIN)/python benchmarks/allocation.py

bench-dag: .venv/ready
	$(BIN)/python benchmarks/dag.py

clean:
	rm -rf demo results logs .snakemake
