# Everything a fresh clone needs: Python 3.11 or newer, make, and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow check docs bench clean

demo: $(STAMP)
	$(BIN)/truetune quickstart --overwrite

test: $(STAMP)
	scripts/test

test-slow: $(STAMP)
	scripts/test -m slow

check: $(STAMP)
	scripts/check

docs: $(STAMP)
	$(BIN)/python scripts/make_docs.py

# Peers are installed for the measurement alone; hours on a small machine. The 0.5B jobs take real
# rows and a model's config from ../shared.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt trl==1.16.0
	$(BIN)/python bench/compare.py --write
	$(BIN)/python bench/trees.py
	$(BIN)/python bench/memory.py

# Installed anew whenever the pins or the package's metadata change.
$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("truetune needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV)
