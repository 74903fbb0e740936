# make demo: the whole experiment.  make test: the suite.  make test-operations: the same system with its real servers,
# browser and kills.  make ui: Dagster on the demo's instance.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROFILE ?= demo
INSTALLED := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1

.PHONY: demo run test test-operations lint ui plan install clean

demo: install
	$(BIN)/sbp run --profile $(PROFILE)

# Your own corpus: make run PROFILE=text, with SBP_EXPERIMENT__CORPUS__SOURCE__PATH naming it.
run: demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not operations"

# They want postgresql and chromium, and skip where one is absent; PYTEST_OPTIONS=--fail-on-skip allows no skip.
test-operations: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder sbp_assets_tests/operations $(PYTEST_OPTIONS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	SBP_PROFILE=tiny $(BIN)/python -W error::UserWarning -c "import sbp_assets.definitions"

ui: install
	$(BIN)/sbp ui --profile $(PROFILE)

plan: install
	$(BIN)/sbp plan --profile $(PROFILE)

install: $(INSTALLED)

$(INSTALLED): requirements/cpu.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] < (3, 13) else "Python 3.11 or 3.12 is needed; say make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) .sbp
