# The commands of this project. `make help` lists them; scripts/setup.sh does the setting up that they share.

.DEFAULT_GOAL := help
.PHONY: help demo test bench gpu build wheels docs lint sanitize-cpu coverage env clean

SETUP := bash scripts/setup.sh
JOBS ?= 2
SHARED_OUT := -n $(JOBS) --dist worksteal
export PYTHON TORCH

help:
	@echo "make demo     train recurrent nets on navigation while pruning them, then show a table and plots"
	@echo "              QUICK=1 (under a minute)  FULL=1 (3 seeds)  TASK=navigation|adding"
	@echo "make test     run the test suite                   ARGS='-k torus' is passed on to pytest"
	@echo "              JOBS=2   processes that share it out; 0 runs it in this one"
	@echo "make bench    run the benchmarks                   ARGS as above"
	@echo "make gpu      on a machine with a CUDA GPU: tests, compute-sanitizer and benchmarks there, under 9 minutes"
	@echo "              PART=tests|sanitize|bench   (uses \$$(PYTHON) as it is: no set-up, no network)"
	@echo "make build    compile the C++ kernels in place     make wheels  wheels in dist/, checked"
	@echo "make docs     the documentation, in build/site/index.html"
	@echo "make lint     ruff, types, clang-format   FIX=1 mends what it can   make coverage   of the Python package"
	@echo "make sanitize-cpu   the C++ kernels under AddressSanitizer and UBSan   QUICK=1 a part of it, as CI runs it"
	@echo "make env      what is installed and active, to paste in a bug report"
	@echo "make clean    remove what was built (not .venv)"
	@echo
	@echo "All but clean first set up what they need, once. If \$$(PYTHON) (default python3) imports torch"
	@echo ">= 2.10, it is used as it is; else .venv is made and torch installed there. Variables:"
	@echo "  PYTHON=python3.12    the Python to use, 3.10 or newer"
	@echo "  TORCH='torch==2.13.0'    what pip installs as torch, options included. On Linux the default brings"
	@echo "      several GB of CUDA libraries. Without an NVIDIA GPU, give the arguments that PyTorch's page"
	@echo "      'Get started' lists for CPU: TORCH='torch==2.13.0 --index-url <the CPU index it names>'"
	@echo "  MODULI_KERNELS_BUILD=python    do without a compiler (slower)"
	@echo "  MAX_JOBS=1           compile one file at a time"

demo:
	@$(SETUP) -m examples.demo $(if $(QUICK),--quick) $(if $(FULL),--full) $(if $(TASK),--task $(TASK))

test:
	@$(SETUP) -m pytest $(SHARED_OUT) $(ARGS)

bench:
	@$(SETUP) -m pytest benchmarks $(ARGS)

# COMMIT: what `git describe --always --dirty --abbrev=40` said, for a tree that came here without its .git
gpu:
	@MODULI_KERNELS_COMMIT=$(COMMIT) $(or $(PYTHON),python3) scripts/gpu.py $(PART) $(ARGS)

build:
	@$(SETUP)

wheels:
	@MODULI_KERNELS_EXTRAS=wheels $(SETUP) scripts/wheels.py

lint:
	@MODULI_KERNELS_EXTRAS="lint lightning" $(SETUP) scripts/lint.py $(if $(FIX),--fix)

sanitize-cpu:
	@$(SETUP) scripts/sanitize_cpu.py $(if $(QUICK),--quick)

coverage:
	@MODULI_KERNELS_EXTRAS=coverage $(SETUP) -m pytest $(SHARED_OUT) --cov --cov-report=term $(ARGS)

docs:
	@MODULI_KERNELS_EXTRAS=docs $(SETUP) -m docs.build

env:
	@$(SETUP) -m moduli_kernels.env_report

clean:
	rm -rf build dist *.egg-info moduli_kernels/_cpu_ops.* moduli_kernels/_functors.*
	rm -rf .pytest_cache .benchmarks .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
