# Every target needs nothing but a clone on Debian 12: the first run sets it up (see tools/setup), later runs start
# at once. PYTHON=/path/to/python3 chooses another interpreter, 3.11 or later, for .venv.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PY := .venv/bin/python

# `su` without `-` keeps the PATH of a user, who has neither nft nor ip in it.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

.PHONY: help setup demo test fuzz bench lint fmt docs clean

help: ## list the targets
	@sed -nE 's/^([a-z]+):.*## (.*)$$/make \1\t\2/p' Makefile | expand -t 14

# Phony on purpose: the script itself decides in a few milliseconds, by content and not by time stamps.
setup: ## Debian packages that are missing, and .venv (the targets below do this themselves)
	@tools/setup

demo: setup ## run the example mesh; KEEP=1 leaves it running (root)
	@$(if $(KEEP),KEEP='$(KEEP)') $(PY) -m examples.demo

test: setup ## run the tests; ARGS='-m "not kernel" -k pool' goes to pytest
	@$(PY) -m pytest $(ARGS)

fuzz: setup ## play changed messages to both HTTP engines, a minute each; FUZZ_S=600 for longer
	@$(PY) -m tests.fuzz --seconds $(or $(FUZZ_S),60) $(ARGS)

bench: ## measure beside nginx, HAProxy, nghttpx and Envoy, 15 minutes; FULL=1 takes longer and writes bench/RESULTS.md (root)
	@tools/setup bench
	@$(PY) -m bench all --seconds 4 $(if $(FULL),--rounds 7 --connections 10000 --write bench --command 'make bench FULL=1',--rounds 3) $(ARGS)

lint: setup ## ruff and mypy; edits nothing
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy -p netproxy -p redirect -p examples -p bench -p docs

fmt: setup ## let ruff fix and format
	@$(PY) -m ruff check --fix-only .
	@$(PY) -m ruff format .

docs: setup ## write anew what the pages in docs/ take from the code
	@$(PY) -m docs.pages

clean: ## remove .venv, caches and build products
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	@find netproxy -name '*.so' -delete
	@find . -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +
