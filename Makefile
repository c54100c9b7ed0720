# Needs Python 3.11 or newer, make and a package index; nothing else. All paths are relative, so the project
# may lie in a folder with a space in its name. Programs are called as `python -m`, never by a script of
# .venv/bin, whose first line would hold an absolute path.

PYTHON ?= python3
ARGS ?=

# Where an NVIDIA driver answers, the demo gets the JAX that uses it. `make demo CUDA=` goes without.
CUDA ?= $(shell nvidia-smi --list-gpus >/dev/null 2>&1 && echo ,cuda)

python := .venv/bin/python
# Each worker has a part of the tests, in order, and takes from another one's when it has done its own. Bytecode is
# written, whatever the environment says: the tests start Python many times.
pytest := PYTHONDONTWRITEBYTECODE= $(python) -m pytest --numprocesses auto --dist worksteal --doctest-modules jaxckpt tests
install := $(python) -m pip install --quiet --disable-pip-version-check

.DELETE_ON_ERROR:
# Two targets must not install into one environment at the same time.
.NOTPARALLEL:
.PHONY: help demo test fast processes check format bench clean

help:
	@echo "make demo     train on digits, be killed in the middle of a save, resume, restore on fewer devices"
	@echo "make test     tests and doctests           (make test ARGS='-k retention')"
	@echo "make fast     those tests that take a minute or two together"
	@echo "make processes   those that start groups of processes"
	@echo "make check    format, lint, types, tests and doctests: what a change must pass"
	@echo "make format   format the code, and fix what can be fixed"
	@echo "make bench    benchmarks                   (make bench ARGS='--help')"
	@echo "make clean    remove .venv and every cache"

demo: .venv/.installed-demo
	$(python) examples/train_digits.py $(ARGS)

test: .venv/.installed-test
	$(pytest) $(ARGS)

processes: .venv/.installed-test
	$(pytest) -m processes $(ARGS)

fast: .venv/.installed-test
	$(pytest) -m 'not slow' $(ARGS)

check: .venv/.installed-dev
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m pyright --warnings --pythonpath $(python)
	$(pytest) $(ARGS)

format: .venv/.installed-dev
	$(python) -m ruff format .
	$(python) -m ruff check --fix .

bench: .venv/.installed-bench
	$(python) -m benchmarks.run $(ARGS)

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment counts as made once .made is there; a half-made one is made anew, and its stamps go with it.
.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxckpt needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear .venv
	@touch $@

# The stamps make the second run skip the installation; a changed pyproject.toml repeats it.
.venv/.installed-demo: .venv/.made pyproject.toml
	$(install) --editable '.[examples$(CUDA)]'
	@touch $@

.venv/.installed-%: .venv/.made pyproject.toml
	$(install) --editable '.[$*]'
	@touch $@
