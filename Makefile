# Every target makes its own .venv when there is none, and re-uses it when there is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
EXTRAS ?= test,lint

.PHONY: demo test test-deep lint format notebooks clean

demo: $(VENV)/.installed  ## all methods on real data, side by side; below 3 minutes
	$(RUN) -m experiments.multidigits demo --resume

test: $(VENV)/.installed  ## the suite, in parallel
	$(RUN) -m pytest -q -n auto --dist loadgroup

test-deep: $(VENV)/.installed  ## also what takes minutes
	$(RUN) -m pytest -q -n auto --dist loadgroup -m "deep or not deep"

lint: $(VENV)/.installed  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(RUN)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

notebooks: $(VENV)/.installed  ## executes the .py sources into .ipynb
	$(BIN)/pip install -q -c constraints.txt -e '.[notebooks]'
	$(BIN)/jupytext --to ipynb --execute notebooks/*.py

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
