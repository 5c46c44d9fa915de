# Each target does its own set-up: a machine with Python >= 3.11, pip and make is enough.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint notebooks clean

demo: .venv/examples
	$(BIN)/python -m examples.language_model

# A process for each core; a file stays in one, as its tests share what they compile.
test: .venv/test
	$(BIN)/python -m pytest -q -n auto --dist loadfile $(PYTEST)

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Executes them; what they print and draw is refreshed by notebooks/refresh.py. No addopts: those are for tests.
notebooks: .venv/notebooks
	$(BIN)/python -m pytest -q -o addopts= --nbmake --nbmake-timeout=300 notebooks/*.ipynb

$(BIN)/python:
	$(PYTHON) -m venv .venv

# One stamp file for each set of extras that has been installed.
.venv/%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

clean:
	rm -rf .venv
