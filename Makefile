# Each target does its own set-up: a machine with Python >= 3.11, pip and make is enough.
PYTHON ?= python3
BIN := .venv/bin

# Each process of a run would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all mutants lint notebooks docs figures browser clean

demo: .venv/examples
	$(BIN)/python -m examples.language_model

# The tests that run by day: all except `nightly`, with each value of a parameter, not each combination of values.
# A process for each core. Neighbors stay in one, as they share what they compile, until the other has no more to do.
test: .venv/test
	$(BIN)/python -m pytest -q -n auto --dist worksteal $(PYTEST)

# Every test that needs no accelerator and no browser, of programs that XLA optimizes, with the types of every function
# checked; by day those of modules with shapes in their signatures.
test-all: .venv/test
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -q -n auto --dist worksteal \
	  --jaxtyping-packages=muonclip_jax,beartype.beartype -m 'not accelerator and not browser' $(PYTEST)

# Faults in the package that the tests by day have to see. WORDS="iterations clip.py" chooses some.
mutants: .venv/test
	$(BIN)/python -m tests.mutants $(WORDS)

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Executes them; what they print and draw is refreshed by notebooks/refresh.py. No addopts: those are for tests.
notebooks: .venv/notebooks
	$(BIN)/python -m pytest -q -o addopts= --nbmake --nbmake-timeout=300 notebooks/*.ipynb

# The site, into build/site. A warning, such as a broken link, is an error.
docs: .venv/docs
	$(BIN)/python -m website

# Redraws the pictures of the documentation.
figures: .venv/test
	$(BIN)/python -m docs.figures

# Opens the site in a headless Chromium. It and its driver are packages of the system, in Debian chromium and chromium-driver.
browser: .venv/browser docs
	$(BIN)/python -m pytest -q -m browser tests/browser

$(BIN)/python:
	$(PYTHON) -m venv .venv

# One stamp file for each set of extras that has been installed.
.venv/%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

clean:
	rm -rf .venv .jax_cache
