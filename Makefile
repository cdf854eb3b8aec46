# make demo and make test do the whole set-up on a fresh machine: a virtual environment in .venv, the pinned
# packages, omni_jax itself. Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that share the fast tests; the slow ones need the memory and the cores for themselves.
WORKERS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := -c constraints.txt
# Debian packages: the synthesisers, and what one from PyPI is compiled with.
SYNTHESISERS := espeak-ng flite festival festvox-kdlpc16k gcc

.PHONY: help demo test lint format bench nano synthesisers
# Two targets at once would install into the same environment.
.NOTPARALLEL:

help:
	@echo 'make demo     ask three recorded questions; the spoken answers go to demo/'
	@echo 'make test     all tests, the slow ones last'
	@echo 'make lint     ruff and mypy'
	@echo 'make format   let ruff lay out the code'
	@echo 'make bench    measure speed and memory'
	@echo 'make nano     train the small model: hours on two cores; continues after an interruption'

demo: $(VENV)/.base
	$(BIN)/omni-jax demo --out demo
	@echo
	@echo 'Listen to demo/*.wav. Now ask your own: $(BIN)/omni-jax ask my.wav'

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m 'not slow' -n $(WORKERS) --dist loadfile
	@if grep -rqs --include='*.py' 'mark\.slow' tests; then $(BIN)/python -m pytest -m slow; fi

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

nano: synthesisers $(VENV)/.nano
	$(BIN)/python -m recipes.nano

synthesisers:
	@for program in espeak-ng flite festival gcc; do command -v $$program >/dev/null || \
		{ echo "make nano needs the program $$program: apt-get install $(SYNTHESISERS)"; exit 1; }; done
	@festival --heap 1000000 -b '(voice_ked_diphone)' >/dev/null 2>&1 || \
		{ echo "make nano needs the voice ked_diphone: apt-get install $(SYNTHESISERS)"; exit 1; }

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "omni_jax needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# What users have: no torch, no tools. What developers have is that and more, so it counts as both.
$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q $(CONSTRAINTS) -e '.[dev]'
	@touch $(VENV)/.base $@

$(VENV)/.nano: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q $(CONSTRAINTS) -e '.[nano,evaluation]'
	@touch $@
