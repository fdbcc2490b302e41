# From an empty machine to a trained model. Run `make` to list all targets. Finished steps are
# skipped.

SHELL := /bin/bash
.SHELLFLAGS := -e -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory --no-builtin-rules

PYTHON ?= python3
BIN := .venv/bin
FASTBERT := $(BIN)/fastbert
PIP := $(BIN)/pip --disable-pip-version-check install -qq
OUT := $(or $(OUT),runs/bench-$(shell date +%Y%m%d-%H%M%S))
# One worker more than there are cores, since many tests wait for processes that they have started.
# With .pyc files each worker, and each process of a test, starts in half the time.
PYTEST = env -u PYTHONDONTWRITEBYTECODE $(BIN)/pytest -q -n $(shell echo $$(($$(nproc) + 1))) \
    --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# Our modules that are not installed, such as the benchmarks.
RUN = PYTHONPATH=.:kernels $(BIN)/python -m

# One thread for each worker of pytest.
test test-all: export OMP_NUM_THREADS := 1

heading = @printf '\n==> %s\n'

define finished
$(heading) "Done. What is there to see:"
@echo "  picture of the loss    $(1)/loss.png"
@echo "  held-out loss          $(1)/evaluate.txt"
@echo "  filled-in sentences    $(1)/samples.txt"
@echo "  model for transformers $(1)/export"
@echo "To start over: rm -r $(1)"
endef

.PHONY: help install demo library test test-all torture mutants check docs bench bench-check \
    bench-step bench-quality bench-downstream speedrun gpu clean

## list these targets
help:
	@awk -F : '/^## / {text = text substr($$0, 3); next} \
	    text {printf "  make %-16s%s\n", $$1, text; text = ""}' Makefile

## create .venv and install fastbert in it
install: .venv/.installed

## train a small model from text and export it for transformers; under 8 minutes on 2 cores
demo: runs/demo/export/config.json
	$(call finished,runs/demo)

## the same with a larger model on all prose found in Python packages; 95 minutes on 2 cores
library: runs/library/export/config.json
	$(call finished,runs/library)

## the tests that a change is likely to break, on all cores, in minutes
test: .venv/.installed-test
	@$(PYTEST) -m "not slow"

## all tests, including long kill tests, many ranks, several nodes and complete tables
test-all: .venv/.installed-test
	@$(PYTEST)

## 200 kills, 1,000 flipped bits, lost nodes: runs must resume with the same losses; takes an hour
torture: .venv/.installed-test
	@$(BIN)/python -m tests.torture

## plant 72 faults, one at a time, and report which of them `make test` notices
mutants: .venv/.installed-test
	@$(BIN)/python -m tests.mutants

## lint, format and types only
check: .venv/.installed-lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

## build the documentation into site/, with warnings as errors
docs: .venv/.installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html: open it in a browser. The search needs a server: $(BIN)/mkdocs serve"

## all benchmarks that need no GPU, in 15 minutes; report in OUT=folder
bench: .venv/.installed-test | data/wiki/manifest.json
	@$(RUN) benchmarks --out $(OUT)

## the same, and check that no ratio fell below 0.85 of the recorded one for this kind of machine
bench-check: .venv/.installed-test | data/wiki/manifest.json
	@$(RUN) benchmarks --out $(OUT)
	@$(RUN) benchmarks.check $(OUT)

## only the training step, against transformers' BertForPreTraining
bench-step: .venv/.installed-test | data/wiki/manifest.json
	@$(RUN) benchmarks.step.bench_step data/wiki

## time to quality against transformers' Trainer; takes half an hour on 2 cores
bench-quality: .venv/.installed-test | data/wiki/manifest.json
	@$(RUN) benchmarks.quality.bench_quality data/wiki --out $(OUT)

## does pre-training pay off? two tasks, including runs/library if it exists; takes hours
bench-downstream: .venv/.installed-test | data/library-8192/manifest.json
	@$(RUN) benchmarks.quality.bench_downstream data/labelled \
	    --data data/library-8192 --out $(OUT) \
	    $(if $(wildcard runs/library/finished),--beside runs/library)

## the speed record: seconds on 2 cores to a loss of 4.0 on [MASK], three seeds
speedrun: .venv/.installed-test | data/wiki/manifest.json
	@$(RUN) speedrun

## everything that needs a GPU, in 10 minutes, with the torch, Triton and pytest of PYTHON; results
## are saved as they come; report in OUT=folder
gpu:
	@PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu --out $(OUT)

## remove .venv and caches, but keep data/ and runs/
clean:
	rm -rf .venv build dist site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# The environment. torch first and exactly, since an open range takes the newest build, which is
# several GB.

.venv/.installed: pyproject.toml kernels/pyproject.toml
	@missing=; \
	if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then \
	    missing+=", Python 3.10 or newer as '$(PYTHON)' (make PYTHON=... takes another)"; \
	elif ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	    missing+=", Python's venv module"; \
	fi; \
	command -v g++ >/dev/null || missing+=", g++"; \
	if [ -n "$$missing" ]; then \
	    echo "missing: $${missing:2}. On Debian or Ubuntu: apt-get install python3-venv g++" >&2; \
	    exit 1; \
	fi
	$(heading) "Environment: .venv with torch 2.13.0 and fastbert \
	(about a minute, more on a slow network)"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch==2.13.0
	@$(PIP) --editable ./kernels --editable . # in one call, so that pip takes the kernels from here
	@touch $@

.venv/.installed-lint: .venv/.installed
	$(heading) "Environment: ruff, pyright and what they read"
	@$(PIP) --editable '.[lint]'
	@touch $@

# The second Triton is one with which a test compiles every kernel, too.
.venv/.installed-test: .venv/.installed
	$(heading) "Environment: what the tests need"
	@$(PIP) --editable '.[test]' # which contains what lint needs
	@$(PIP) --upgrade --no-deps --target .venv/triton-oldest triton==3.6.0
	@touch .venv/.installed-lint $@

.venv/.installed-docs: .venv/.installed
	$(heading) "Environment: what builds the documentation"
	@$(PIP) --editable '.[docs]'
	@touch $@

# The runs, each by the recipe of its name. A step whose file exists is skipped. `|` means that only
# the existence of a file counts, not its age.

data/wiki.jsonl: | .venv/.installed
	$(heading) "Text: 10,033 articles of English Wikipedia, pinned and checked, CC BY-SA 4.0"
	@$(BIN)/python examples/encyclopedia.py $@

data/wiki/manifest.json: | data/wiki.jsonl
	$(heading) "Prepare: text to a vocabulary and token ids"
	@$(FASTBERT) prepare data/wiki.jsonl --out data/wiki --vocab-size 4096 --heldout 0.05

data/labelled/pretrain.jsonl: | data/wiki.jsonl
	$(heading) "Labelled texts: topics of these articles, and film reviews"
	@$(BIN)/python examples/labelled_texts.py data/wiki.jsonl data/labelled

data/library.jsonl: | data/labelled/pretrain.jsonl
	$(heading) "Text: 39 MB of prose: articles, speeches, the Brown corpus, the Bible, \
	a dictionary; pinned and checked"
	@$(BIN)/python examples/library.py data/labelled $@

data/library-%/manifest.json: | data/library.jsonl
	$(heading) "Prepare: text to a vocabulary of $* and token ids"
	@$(FASTBERT) prepare data/library.jsonl --out data/library-$* --vocab-size $* --heldout 0.02

runs/demo/finished: | data/wiki/manifest.json
runs/library/finished: | data/library-16384/manifest.json

runs/%/finished:
	$(heading) "Pretrain by fastbert/recipes/$*.toml; Ctrl-C saves, and make $* resumes from there"
	@resume=; if [ -e runs/$*/.owner ]; then resume=--resume; fi; \
	$(FASTBERT) pretrain fastbert/recipes/$*.toml $$resume
	@touch $@

runs/%/evaluate.txt: | runs/%/finished
	$(heading) "Evaluate: on text that was held out"
	@$(FASTBERT) evaluate runs/$* | tee $@

runs/%/samples.txt: | runs/%/evaluate.txt
	$(heading) "Fill and nsp: sentences chosen before the model was there"
	@fill() { $(FASTBERT) fill-mask runs/$* "$$1"; }; \
	pair() { $(FASTBERT) nsp runs/$* "$$1" "$$2"; echo; }; \
	{ fill "The United [MASK] of America is a country in North America."; \
	  fill "She was born [MASK] 1867 in Warsaw, the capital of Poland."; \
	  fill "It is one of the [MASK] important works of the 19th century."; \
	  fill "The river flows through the [MASK] of Germany and Austria."; \
	  pair "The lion is a large cat native to Africa and India." \
	    "It has a muscular body, a short head and round ears."; \
	  pair "The lion is a large cat native to Africa and India." \
	    "The party won a majority of seats in the election."; \
	  pair "The Danube is a river in Central Europe." \
	    "It flows through Austria and Hungary to the Black Sea."; \
	  pair "The Danube is a river in Central Europe." \
	    "She released her first studio album in 1994."; \
	} | tee $@

runs/%/export/config.json: | runs/%/samples.txt
	$(heading) "Export: a Hugging Face folder, compared with our own logits"
	@$(FASTBERT) export runs/$* --out runs/$*/export

.SECONDARY: # keeps what stands between the steps
