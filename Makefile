PYTHON ?= python

.PHONY: check format-check lint types spelling format test test-trl

check: format-check lint types spelling

format-check:
	$(PYTHON) -m ruff format --check .

lint:
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m mypy trl_selective

spelling:
	$(PYTHON) -m codespell_lib

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:
	$(PYTHON) -m pytest

test-trl:
	PYTHON=$(PYTHON) .ci/test-trl
