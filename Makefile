# `make demo` and `make test` do all set-up themselves.
PYTHON ?= python3
VENV   ?= .venv
# what goes into it, besides torch and setuptools
PINNED ?= requirements-dev.txt
PY      = $(VENV)/bin/python
PIP     = $(PY) -m pip --disable-pip-version-check
STAMP   = $(VENV)/.installed
RUNS    = $(VENV)/.runs

# Without a GPU DeepSpeed has to be told so, and one thread a process is fastest: the processes share the cores.
ifeq ($(shell nvidia-smi -L 2>/dev/null | grep -c GPU),0)
CPU_ENV = DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
endif

.PHONY: help venv demo test test-all test-oldest lint format bench clean

help:
	@echo "make demo | test | test-all | test-oldest | lint | format | bench | venv | clean"

venv: $(STAMP)

# torch first: DeepSpeed's build looks for it, and no other package may choose its version.
# DeepSpeed is built from source against the torch in the venv, hence without isolation.
define SET_UP
	@echo "setting up $(VENV) with what $(1) pins, DeepSpeed built from source: some minutes, once"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' requirements.txt)" "$$(grep '^setuptools==' requirements-dev.txt)"
	$(PIP) install --no-build-isolation -r $(1)
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	$(PIP) check
	touch $(RUNS)
endef

$(STAMP): requirements.txt requirements-dev.txt $(PINNED) setup.py
	$(call SET_UP,$(PINNED))
	touch $@

# without the developers' tools
$(RUNS): requirements.txt setup.py
	$(call SET_UP,requirements.txt)

demo: $(RUNS)
	$(CPU_ENV) $(PY) -m deepspeed_sentinel demo

# Files side by side: unit tests take one core, and jobs wait, of which two leave cores idle. A job has up to 16 processes,
# 0.3 GB each.
JOBS ?= 3
# Workers share what they, or `make lint`, have compiled of the tests.
ONE_PYTEST = env -u PYTHONDONTWRITEBYTECODE $(CPU_ENV) $(PY) -m pytest
PYTEST = $(ONE_PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: venv
	$(PYTEST) $(CHOSEN)

test-all: venv
	$(PYTEST) -m ""

# What an older DeepSpeed, numpy, pydantic or transformers would break, with the oldest that setup.py allows: one of each
# kind. DeepSpeed 0.16.0 cannot checkpoint activations on a CPU.
OLDEST = tests/test_versions.py tests/engine/test_internals.py tests/hf $(addprefix integration_tests/test_,identity.py \
    exclusion.py faults.py state.py ways_in.py huggingface.py) -k 'not checkpointing and not int_mask and not dynamic \
    and not mixtral/checkpointed'
test-oldest:
	$(MAKE) test VENV=.venv-oldest PINNED=requirements-oldest.txt CHOSEN="$(OLDEST)"

# Types and layers are checked on the installed layout, where kernels/ is deepspeed_sentinel.kernels. Tests that `make test`
# leaves out can at least be collected.
LAYOUT = build/layout
lint: venv
	$(PY) -m ruff check .
	rm -rf $(LAYOUT) build/lib
	$(PY) setup.py --quiet build_py --build-lib $(LAYOUT) 2>/dev/null
	cd $(LAYOUT) && $(abspath $(PY)) -m mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p deepspeed_sentinel
	cd $(LAYOUT) && $(abspath $(VENV))/bin/lint-imports --config $(CURDIR)/pyproject.toml
	$(ONE_PYTEST) --collect-only -q -m "" > $(LAYOUT)/collected.txt || { tail -50 $(LAYOUT)/collected.txt; exit 1; }

format: venv
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: venv
	$(CPU_ENV) $(PY) benchmarks/kernels.py
	$(CPU_ENV) $(PY) benchmarks/step_cost.py
	$(CPU_ENV) $(PY) benchmarks/engine_overhead.py

clean:
	rm -rf $(VENV) .venv-oldest build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
