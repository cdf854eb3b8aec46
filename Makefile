# `make demo` and `make test` do the whole set-up on a fresh machine: a virtual environment, the packages, omni_jax.
# Another Python has an environment of its own: make test PYTHON=python3.13

PYTHON ?= python3
VENV := .venv$(if $(filter python3,$(PYTHON)),,-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
# Processes that share the tests.
WORKERS ?= 2
FAST := not slow and not nightly
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Python 3.11 gets the pinned versions; others the newest that pip resolves.
CONSTRAINTS := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" * (sys.version_info[:2] == (3, 11)))')
# Debian packages for `make nano`: the synthesizers, and a compiler for one from PyPI.
SYNTHESIZERS := espeak-ng flite festival festvox-kdlpc16k gcc

.PHONY: help demo smoke test test-slow test-nightly test-clients coverage lint format docs bench nano synthesizers
# Two targets at once would install into the same environment.
.NOTPARALLEL:

help:
	@echo 'make demo       answer three recorded questions; the spoken answers go to demo/'
	@echo 'make test       the tests, 8 minutes on two cores'
	@echo 'make test-slow  the long tests: TPU compilations, large files, kill tests, fuzzing, browser'
	@echo 'make test-nightly  the longest: programs of a pod, a trial of the recipe, the optimized numeric tests'
	@echo 'make test-clients  OpenAI, its Agents SDK, Pipecat and LiveKit against a server of nano'
	@echo 'make coverage   line and branch coverage of make test'
	@echo 'make lint       ruff, mypy and the import contract'
	@echo 'make format     format the code with ruff'
	@echo 'make docs       build the documentation into build/docs'
	@echo 'make bench      measure speed and memory'
	@echo 'make nano       train the shipped model again, hours on two cores; resumes where it was interrupted'

demo: $(VENV)/.base
	$(BIN)/omni-jax demo --out demo
	@echo
	@echo 'Listen to demo/*.wav. Now ask your own: $(BIN)/omni-jax ask my.wav'

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m '$(FAST)' -n $(WORKERS)

# A quick check of a Python with the core packages alone, without PyTorch.
smoke: $(VENV)/.base
	$(PIP) install -q $(CONSTRAINTS) pytest
	$(BIN)/omni-jax demo --out build/smoke
	$(BIN)/python -m pytest -q tests/config tests/test_delay.py tests/test_prompts.py tests/inference/test_engine.py

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m 'slow and not nightly' -n $(WORKERS)

# What `make test` compiles without optimization, once more as users run it.
NUMERIC := tests/model tests/codec tests/inference/test_engine.py tests/training/test_gradients.py

test-nightly: $(VENV)/.dev
	$(BIN)/python -m pytest -m nightly
	OMNI_JAX_TEST_OPTIMIZED=1 $(BIN)/python -m pytest -m '$(FAST)' -n $(WORKERS) $(NUMERIC)

# Clients of others, unchanged, each with its packages in an environment of its own.
CLIENTS := openai_client agents_sdk pipecat_service livekit_plugin
test-clients: $(VENV)/.dev $(CLIENTS:%=$(VENV)-%/.installed)
	$(BIN)/python -m tests.clients $(foreach name,$(CLIENTS),$(name)=$(VENV)-$(name)/bin/python)

coverage: $(VENV)/.dev
	rm -f .coverage .coverage.*
	$(BIN)/python -m pytest -m '$(FAST)' -n $(WORKERS) --cov --cov-report=term

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

nano: synthesizers $(VENV)/.nano
	$(BIN)/python -m recipes.nano

synthesizers:
	@for program in espeak-ng flite festival gcc; do command -v $$program >/dev/null || \
		{ echo "make nano needs the program $$program: apt-get install $(SYNTHESIZERS)"; exit 1; }; done
	@festival --heap 1000000 -b '(voice_ked_diphone)' >/dev/null 2>&1 || \
		{ echo "make nano needs the voice ked_diphone: apt-get install $(SYNTHESIZERS)"; exit 1; }

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "omni_jax needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# `.base` is what users have; `.dev` is that and more, so it counts as both.
$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q $(CONSTRAINTS) -e '.[dev]'
	@touch $(VENV)/.base $@

# The example says what it needs.
$(CLIENTS:%=$(VENV)-%/.installed): $(VENV)-%/.installed: examples/realtime/%.py
	$(PYTHON) -m venv $(VENV)-$*
	eval "$(VENV)-$*/bin/pip install -q $$(sed -n 's/^ *pip install //p' $<)"
	@touch $@

$(VENV)/.nano: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q $(CONSTRAINTS) -e '.[nano]'
	@touch $@
