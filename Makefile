# `make demo` and `make test` are all a newcomer needs; both make the environment when it is missing.
PYTHON ?= python3
BIN    := .venv/bin
STAMP  := .venv/.installed

.PHONY: help demo test test-all docs prepare clean

help:
	@echo "make demo     train, decompose and reuse a small modular network (a minute or two)"
	@echo "make test     the tests, the chapters' notebooks and the documentation site"
	@echo "make test-all the same, what takes long (notebooks that train, full depth), and coverage"
	@echo "make docs     build the documentation site into _docs/html"
	@echo "make prepare  after editing notebooks: export, clean, README"
	@echo "make clean    remove what was built"

$(STAMP): settings.ini setup.py
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'mwt needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/mwt demo --out runs/demo --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "" --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

docs: $(STAMP)
	$(BIN)/python docs/build.py

prepare: $(STAMP)
	$(BIN)/python tools/prepare.py

clean:
	rm -rf _docs _proc _sphinx runs .pytest_cache .hypothesis .coverage
