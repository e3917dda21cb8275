# make quickstart   from nothing to a trained Chain-of-Experts model and its loss curve, in runs/quickstart
# make test         the fast tests           make test-all      the slow ones too
# make lint         style                    make test-mutants  does the suite catch planted faults?
#
# Every target makes its own environment in .venv first, once; later runs need no network.
#   PYTHON=python3.11                    the interpreter to make it with
#   VENV_ARGS=--system-site-packages     use a torch that is installed already
#   OVERRIDES="train.steps=50"           settings passed on to pretrain_coe.py by quickstart

PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=
OVERRIDES ?=

PY := $(VENV)/bin/python
RUN := runs/quickstart
DATA := $(RUN)/data

.DELETE_ON_ERROR:
.PHONY: quickstart test test-all test-mutants lint clean-quickstart

# --- environment ---------------------------------------------------------------------------------
# A stamp per set of extras: made again when the requirements change, and nothing is fetched otherwise.

$(VENV)/.installed-run: EXTRAS = data,plot
$(VENV)/.installed-test: EXTRAS = data,plot,test
$(VENV)/.installed-%: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	@# A torch that is there already (--system-site-packages) is kept, whatever its version.
	@$(PY) -c 'import torch' 2>/dev/null \
	    && grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt \
	    || cp constraints.txt $(VENV)/constraints.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# --- quickstart ----------------------------------------------------------------------------------

quickstart: $(RUN)/loss.png
	@echo "Loss curve: $(RUN)/loss.png   metrics: $(RUN)/metrics.jsonl   checkpoints: $(RUN)/checkpoints"

clean-quickstart:
	rm -rf $(RUN)

# --- checks --------------------------------------------------------------------------------------

test: $(VENV)/.installed-test
	$(PY) -m pytest -m "not slow and not gpu"

test-all: $(VENV)/.installed-test
	$(PY) -m pytest

test-mutants: $(VENV)/.installed-test
	$(PY) tests/mutants/run.py

lint: $(VENV)/.installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
