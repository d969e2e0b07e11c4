# make setup   build .venv with the pinned versions          make test   the test suite
# make demo    prepare text, train over 4 processes, report   make lint   ruff and pyright
# make fuzz    10,000 damaged configs and some thousand other files; FUZZ_EXAMPLES=N for more or fewer
# make setup-slurm   Debian's SLURM, for the tests that need it (root)
# make soak    20 kills of a short run; three courses of 2,000 steps, stopped, killed, in changing layouts; SOAK="--steps N"
# make test-gguf   exports run by llama.cpp, which it builds first (C++ compiler; 20 minutes on two cores)
# A GPU node that brings its own torch: make setup TORCH= PYTHON=python3.12 (and see README.md).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Many tests start processes of their own, so more than half of the cores gains little.
TEST_PROCESSES ?= 2
LLAMA_CPP ?= llama-cpp-python==0.3.36
LLAMA_CPP_STAMP := $(VENV)/.llama_cpp_installed

FUZZ_EXAMPLES ?= 10000

.PHONY: setup setup-slurm demo test test-gguf fuzz soak lint clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,7p' Makefile | cut -c3-

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or 3.12 is needed, %s is %d.%d; try make PYTHON=python3.11" % (sys.executable, *sys.version_info[:2]) if not (3, 11) <= sys.version_info[:2] <= (3, 12) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH),$(TORCH)) "setuptools>=77" wheel ninja py-cpuinfo
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

# Tests start clusters of their own from these programs (tests/launchers/slurm_cluster.py), not the system's services.
setup-slurm:
	@if ! command -v slurmctld > /dev/null; then \
		[ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null || { echo "setup-slurm needs root and apt-get; elsewhere install munged, slurmctld and slurmd" >&2; exit 1; }; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge > /dev/null; \
	fi

demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" tools/demo.sh

test: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

test-gguf: $(LLAMA_CPP_STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m gguf $(PYTEST_ARGS)

fuzz: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest tests/fuzz $(PYTEST_ARGS)

soak: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m soak $(PYTEST_ARGS)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/soak.py $(SOAK)

# llama-cpp-python comes as source only: pip compiles llama.cpp for the processor at hand.
$(LLAMA_CPP_STAMP): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt "$(LLAMA_CPP)"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) runs data build
