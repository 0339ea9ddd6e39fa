# The commands of this project. `make help` lists them. scripts/setup.sh, which they share, sets up what they need.

.DEFAULT_GOAL := help
.PHONY: help demo test bench gpu build wheels environments docs lint sanitize-cpu coverage env clean

SETUP := bash scripts/setup.sh
JOBS ?= 2
WORKERS := -n $(JOBS) --dist worksteal
export PYTHON TORCH

help:
	@echo "make demo     train recurrent nets on navigation while pruning them, then show a table and plots"
	@echo "              QUICK=1 (under a minute)  FULL=1 (3 seeds)  TASK=navigation|adding"
	@echo "make test     run the test suite                   ARGS='-k torus' is passed on to pytest"
	@echo "              JOBS=2   the number of processes that share the tests; 0 runs them in one"
	@echo "make bench    run the benchmarks                   ARGS as above"
	@echo "make gpu      on a machine with a CUDA GPU: tests, compute-sanitizer and benchmarks there, under 9 minutes"
	@echo "              PART=tests|sanitize|bench   (uses \$$(PYTHON) without any set-up or network)"
	@echo "make build    compile the C++ kernels in place"
	@echo "make wheels   build the wheels into dist/ and check them"
	@echo "make environments   run the tests on one wheel with each Python and torch that can be had: the list stands in"
	@echo "              scripts/environments.py   QUICK=1 the tests that versions have broken so far, JOBS as above"
	@echo "              ARGS='--python 3.12 --torch 2.14' one of them"
	@echo "make lint     run pre-commit: ruff, types, clang-format       FIX=1 lets them change what they can"
	@echo "make coverage run the test suite and show which lines of the Python package it reaches"
	@echo "make sanitize-cpu   test the C++ kernels under AddressSanitizer and UBSan   QUICK=1 a part, as CI runs it"
	@echo "make docs     build the documentation into build/site/index.html"
	@echo "make env      show what is installed and active, for a bug report"
	@echo "make clean    remove what was built, but keep .venv"
	@echo
	@echo "All but gpu and clean first set up what they need, once. A \$$(PYTHON) (default python3) that has torch"
	@echo ">= 2.10 is used as it is, and what else it lacks is installed in .venv beside it. If it has no torch,"
	@echo "torch is installed in .venv too. Variables:"
	@echo "  PYTHON=python3.12    the Python to use, 3.10 or newer"
	@echo "  TORCH='torch==2.13.0'    what pip installs as torch, options included. On Linux the default brings"
	@echo "      several GB of CUDA libraries. Without an NVIDIA GPU, give the arguments that PyTorch's page"
	@echo "      'Get started' lists for CPU: TORCH='torch==2.13.0 --index-url <the CPU index it names>'"
	@echo "  MODULI_KERNELS_BUILD=python    use no compiler; the package is slower then"
	@echo "  MAX_JOBS=1           compile one file at a time"

demo:
	@$(SETUP) -m examples.demo $(if $(QUICK),--quick) $(if $(FULL),--full) $(if $(TASK),--task $(TASK))

test:
	@$(SETUP) -m pytest $(WORKERS) $(ARGS)

bench:
	@$(SETUP) -m pytest benchmarks $(ARGS)

# COMMIT is the output of `git describe --always --dirty --abbrev=40`, for a tree that was copied without its .git.
gpu:
	@MODULI_KERNELS_COMMIT=$(COMMIT) $(or $(PYTHON),python3) -m scripts.gpu $(PART) $(ARGS)

build:
	@$(SETUP)

wheels:
	@MODULI_KERNELS_EXTRAS=wheels $(SETUP) -m scripts.wheels

environments:
	@MODULI_KERNELS_EXTRAS=environments $(SETUP) -m scripts.environments $(if $(QUICK),--quick) --jobs $(JOBS) $(ARGS)

lint:
	@MODULI_KERNELS_EXTRAS="lint lightning" $(SETUP) -m pre_commit run --all-files --show-diff-on-failure \
		$(if $(FIX),--hook-stage manual)

sanitize-cpu:
	@$(SETUP) -m scripts.sanitize_cpu $(if $(QUICK),--quick)

coverage:
	@MODULI_KERNELS_EXTRAS=coverage $(SETUP) -m pytest $(WORKERS) --cov --cov-report=term $(ARGS)

docs:
	@MODULI_KERNELS_EXTRAS=docs $(SETUP) -m docs.build

env:
	@$(SETUP) -m moduli_kernels.env_report

clean:
	rm -rf build dist *.egg-info moduli_kernels/_cpu_ops.* moduli_kernels/_functors.*
	rm -rf .pytest_cache .benchmarks .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
