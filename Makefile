# Every target makes its own .venv when there is none, and re-uses it when there is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
EXTRAS ?= test,lint

# What runs on every jax that the library supports: the core, without the extra train.
CORE_TESTS := tests/test_contract.py tests/test_balancer.py tests/test_stack.py \
  tests/methods tests/gradients tests/solvers $(wildcard tests/devices)
CORE_TOOLS := pytest pytest-xdist hypothesis beartype chex equinox flax scipy
NEWEST := $(wildcard $(HOME)/.pyenv/versions/3.*/bin/python)
FIND_NEWEST = for p in python3.14 python3.13 python3.12 \
    $$(printf '%s\n' $(NEWEST) | sort -rV) $(PYTHON); do \
  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; \
    then echo $$p; break; fi; done

.PHONY: demo replay leaderboard-check test test-deep test-lowest test-newest \
  test-package lint format notebooks docs docs-links clean

demo: $(VENV)/.installed  ## all methods on real data, side by side; below 3 minutes
	$(RUN) -m experiments.multidigits demo --resume

# Folder of the data sets: make replay DATA_DIR=...
DATA_DIR ?= $(MTLJAX_DATA_DIR)
replay: $(VENV)/.installed  ## trains one committed row of every table again
	$(RUN) -m experiments.common.replay $(if $(DATA_DIR),--data-dir $(DATA_DIR))

leaderboard-check: $(VENV)/.installed  ## linear models on the sets of the leaderboard
	$(RUN) -m experiments.leaderboard cpu --check-sets \
	  $(if $(DATA_DIR),--data-dir $(DATA_DIR))

test: $(VENV)/.installed  ## the suite, in parallel
	$(RUN) -m pytest -q -n auto --dist loadgroup

test-deep: $(VENV)/.installed  ## also what takes minutes
	$(RUN) -m pytest -q -n auto --dist loadgroup -m "deep or not deep"

test-lowest: .venv-lowest/.installed  ## the core with the lowest supported versions
	.venv-lowest/bin/python -m pytest -q -n auto --dist loadgroup $(CORE_TESTS)

test-newest: .venv-newest/.installed  ## the core with the newest jax, Python >= 3.12
	.venv-newest/bin/python -m pytest -q -n auto --dist loadgroup $(CORE_TESTS)

test-package: $(VENV)/.installed  ## the sdist and the wheel, in fresh environments
	PYTHON=$(abspath $(RUN)) .ci/package $(CORE_TESTS)

lint: $(VENV)/.installed  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(RUN)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

notebooks: $(VENV)/.installed  ## executes the .py sources into .ipynb; draws the toy figure
	$(BIN)/pip install -q -c constraints.txt -e '.[notebooks]'
	MTLJAX_TOY_FIGURE=$(CURDIR)/docs/_static/toy.png \
	  $(BIN)/jupytext --to ipynb --execute notebooks/*.py

# A page with an error, a broken reference or a warning fails the build. The environment
# variable MTLJAX_DOCS_EXECUTE=force executes all code again, cache is the default.
docs: $(VENV)/.docs  ## the site in docs/_build/html, without network
	MTLJAX_DOCS_OFFLINE=1 $(BIN)/sphinx-build -q -W --keep-going -n -b html \
	  docs docs/_build/html

docs-links: $(VENV)/.docs  ## external links of the site; needs a network
	MTLJAX_DOCS_OFFLINE=1 MTLJAX_DOCS_EXECUTE=off $(BIN)/sphinx-build -q \
	  -b linkcheck docs docs/_build/links

$(VENV)/.docs: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

.venv-lowest/.installed: pyproject.toml constraints-lowest.txt
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install -q -c constraints-lowest.txt -e . $(CORE_TOOLS)
	touch $@

.venv-newest/.installed: pyproject.toml
	@test -x .venv-newest/bin/python || { found=$$($(FIND_NEWEST)); \
	  test -n "$$found" || { echo "make test-newest needs Python 3.12 or later:" \
	    "install it, or pass PYTHON=/path/to/python3."; exit 1; }; \
	  echo "$$found -m venv .venv-newest"; $$found -m venv .venv-newest; }
	.venv-newest/bin/pip install -q --upgrade -e . $(CORE_TOOLS)
	touch $@

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest .pytest_cache .ruff_cache .hypothesis
