# Everything a fresh clone needs: Python 3.11 or newer, make, and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LITGPT := .venv-litgpt

.PHONY: demo test test-slow check docs docs-site bench bench-gpu reliability supply-chain clean

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

# The pages of docs/ as a site in site/; a warning, such as a link that leads nowhere, is an error.
docs-site: docs
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/zensical build --strict --clean

# What is promised of killed, stopped, starved and doubled runs, tried about 900 times: hours. It goes
# on where it was stopped, and writes the table of docs/reliability.md.
reliability: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/hostile/reliability.py \
		--results .reliability.json --write

# In CI, where the network is there: scripts/supply_chain.py --required.
supply-chain: $(STAMP)
	$(BIN)/python scripts/supply_chain.py

# Peers are installed for the measurement alone. About two hours on two quiet cores; it goes on
# where it was stopped. Real rows and a model's config come from the folder that
# bench/workloads.py names: without it the embedded base alone is measured.
bench: $(STAMP) $(LITGPT)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt trl==1.16.0
	$(BIN)/python bench/compare.py --write
	$(BIN)/python bench/trees.py --write
	$(BIN)/python bench/memory.py --write

# On a machine with a GPU; in two runs of about ten minutes, the second of which goes on.
bench-gpu: $(STAMP) .venv-unsloth/.installed .venv-axolotl/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[liger,bitsandbytes]' trl==1.16.0
	$(BIN)/python bench/compare.py --gpu --write

.venv-unsloth/.installed .venv-axolotl/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(subst .venv-,,$(@D)) \
		&& touch $@ || echo "$(subst .venv-,,$(@D)) is not measured: it could not be installed"

# LitGPT wants huggingface_hub below 1.4, so it lives apart, with the same torch. Where it cannot be
# had, its lines of the table say so and the rest is measured.
$(LITGPT)/.installed: constraints.txt
	$(PYTHON) -m venv $(LITGPT)
	$(LITGPT)/bin/python -m pip install --quiet litgpt==0.5.13 $$(grep '^torch==' constraints.txt) \
		&& touch $@ || echo "LitGPT is not measured: it could not be installed"

# Installed anew whenever the pins or the package's metadata change.
$(STAMP): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("truetune needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(LITGPT) .venv-unsloth .venv-axolotl .venv-versions .venv-supply .reliability.json
