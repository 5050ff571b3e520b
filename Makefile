# `make demo` and `make test` do all set-up themselves: either one first, from a clean clone.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find engine -type f)

.PHONY: demo test check bench docs wheel setup clean

demo: setup
	$(BIN)/lowbit demo

test: setup
	$(BIN)/pytest --numprocesses auto --dist loadfile --max-worker-restart 0

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The engine beside its peers, XNOR-Net's headline, how cost grows, where time goes, what a second thread gains, how fast
# training is; some thirty minutes, on an idle machine. Writes over the published figures, which are from several
# machines: docs/engine.md says how to measure beside them.
bench: setup
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/xnor_headline.py
	$(BIN)/python benchmarks/cost_growth.py
	$(BIN)/python benchmarks/where_time_goes.py
	$(BIN)/python benchmarks/two_threads.py
	$(BIN)/python benchmarks/training.py

# Runs the tutorial, so that its output is of this version; the site is in site/.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean --quiet

# For other machines, in dist/: auditwheel finds out, and writes into its name, from which glibc on it runs.
wheel: setup
	rm -rf build/wheel
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --wheel-dir dist build/wheel/*.whl

setup: .venv/installed

# Reinstalls when the native engine or the dependencies change; Python sources are used in place.
.venv/installed: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lowbit needs Python 3.11 or newer; choose one with: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist site
