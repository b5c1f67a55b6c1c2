# Both commands set up what they need in .venv; `make PYTHON=/path/to/python3.12 demo` picks the interpreter.
PYTHON ?= python3
VENV := .venv/bin

.PHONY: help setup demo test dist docs tables compat lint launches mutate clean

help:
	@echo "make demo   prune, pack, check and measure a small language model (seven minutes on two cores)"
	@echo "make test   style, layers, types and tests"
	@echo "make dist   sdist and wheel, each tried in an environment of its own (five minutes on two cores)"
	@echo "make docs   the pages of docs as a site in .cache/site, from an environment of its own"
	@echo "make compat the oldest and newest transformers and vLLM, each in an environment of its own (tens of gigabytes)"
	@echo "make launches [TRITON=3.6.0]  compile every kernel launch for four kinds of cards, without a card (half an hour on two cores)"
	@echo "make mutate [ARGS='pattern --sample 50']  break the code in small ways and see which ones no test notices (hours)"
	@echo "make tables write every table of the documents that stands between markers from benchmarks/results and the shipped plans"
	@echo "make setup  only set up .venv for both"
	@echo "make clean  remove .venv, caches and the demo's output"

setup:
	@$(PYTHON) scripts/setup_env.py test

demo:
	@$(PYTHON) scripts/setup_env.py demo
	@$(VENV)/python examples/demo.py $(ARGS)

lint:
	@$(PYTHON) scripts/setup_env.py test
	@$(VENV)/ruff check .
	@$(VENV)/lint-imports
	@$(VENV)/mypy

test: lint
	@$(VENV)/python -m pytest -q $(ARGS)
	@$(VENV)/python -m tests.compat -s .venv/transformers-oldest transformers-floor -- $(ARGS)

dist:
	@$(PYTHON) scripts/setup_env.py test
	@$(VENV)/python -m tests.dist $(ARGS)

docs:
	@$(PYTHON) scripts/build_docs.py

# By hand: each environment that is named, or all, gets a row in tests/compat_runs.csv.
compat:
	@$(PYTHON) scripts/setup_env.py test
	@$(VENV)/python -m tests.compat -o tests/compat_runs.csv $(ARGS)

launches:
	@$(PYTHON) scripts/setup_env.py test
ifdef TRITON
	@test -d .cache/triton-$(TRITON) || $(VENV)/python -m pip install -q --no-deps --target .cache/triton-$(TRITON) triton==$(TRITON)
endif
	@PYTHONPATH=$(if $(TRITON),.cache/triton-$(TRITON)) $(VENV)/python -W ignore -m tests.launches $(ARGS)

mutate:
	@$(PYTHON) scripts/setup_env.py test
	@$(VENV)/python -m tests.mutations $(ARGS)

tables:
	@$(PYTHON) scripts/setup_env.py test
	@$(VENV)/python benchmarks/document_tables.py $(ARGS)

clean:
	rm -rf .venv .compat .cache demo-output dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache .mypy_cache
