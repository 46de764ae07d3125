# `make check` is what CI runs. PYTHON is an interpreter with requirements.txt installed.
PYTHON ?= python

.PHONY: check format lint types test slow fuzz

check: lint types test

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest -q

slow:
	$(PYTHON) -m pytest -q -m slow

# Random inputs; FUZZ_SEEDS=0:2000 chooses the seeds.
fuzz:
	$(PYTHON) -m pytest -q -m fuzz tests/fuzz

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
