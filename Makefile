# `make help` lists what there is to do.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ORDERS ?=
LIMIT ?=
CONCURRENCY ?= 32
OPENING_STOCK ?= 300
MINUTES ?= 15
ENDURANCE_MINUTES ?= 10
SEED ?=
RATE ?= 2100
SKUS ?= 100000
SKEW ?= 1
BREAKING_BASE ?= HEAD
PROTOS := $(shell find protos -name '*.proto')
export PYTHONDONTWRITEBYTECODE := 1
REPLAY := $(if $(ORDERS),--orders '$(ORDERS)') $(if $(LIMIT),--limit $(LIMIT)) \
          --concurrency $(CONCURRENCY) --opening-stock $(OPENING_STOCK)
# A command that finds the release before in .local/base, if there is a BASE.
define with_base
set -e; $(if $(BASE),git worktree remove --force .local/base 2>/dev/null || true; \
  mkdir -p .local; git worktree add --quiet --force --detach .local/base $(BASE); \
  $(MAKE) --no-print-directory -C .local/base gen; trap 'git worktree remove --force .local/base' EXIT;) $(1)
endef

.DEFAULT_GOAL := help
.PHONY: help run demo up down test chaos endurance audit planted-bugs upgrade-test k8s-check k8s-test lint format bench bench-quick capacity gen clean

help: ## Show this list
	@printf 'Holdfast keeps stock right under load.\n\n'
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@printf '\nOptions of run and demo: ORDERS=FILE LIMIT=orders CONCURRENCY=%s OPENING_STOCK=%s\n' \
	  '$(CONCURRENCY)' '$(OPENING_STOCK)'

run: gen ## Start everything, replay orders, show what happened, stay up until Ctrl-C
	@$(BIN)/python -m deploy.local run $(REPLAY)

demo: gen ## The same, but ends by itself; figures in .local/demo.json
	@$(BIN)/python -m deploy.local demo $(REPLAY)

up: gen ## Start everything in the background
	@$(BIN)/python -m deploy.local up

down: ## Stop what `make up` started
	@$(BIN)/python -m deploy.local down

test: gen ## Run all tests on real PostgreSQL, Redis and Kafka
	@$(BIN)/python -m pytest $(ARGS)

chaos: gen ## Shop while everything fails in turn, then audit: MINUTES=15 SEED=number BASE=TAG
	@$(call with_base,$(BIN)/python -m tests.model.chaos --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) \
	  $(if $(BASE),--base .local/base))

endurance: gen ## Minutes at capacity and with three times the callers, then see that all is as it was: ENDURANCE_MINUTES=10
	@$(BIN)/python -m tests.model.endurance --minutes $(ENDURANCE_MINUTES)

audit: gen ## Judge the deployment that runs: ledger, reservations, topics, mart
	@$(BIN)/python -m tests.model.audit

planted-bugs: gen ## Plant bugs one at a time and see which test catches each (half an hour)
	@$(BIN)/python -m tests.model.mutations

upgrade-test: gen ## Run the release before (BASE=TAG) and this one on one database, each way
	@test -n '$(BASE)' || { echo 'make upgrade-test needs BASE=TAG, the release before'; exit 1; }
	@$(call with_base,HOLDFAST_BASE=.local/base $(BIN)/python -m pytest tests/e2e/test_upgrade.py $(ARGS))

k8s-check: gen ## Build every overlay for Kubernetes and check what is in it (needs kubectl or kustomize)
	@command -v kubectl >/dev/null || command -v kustomize >/dev/null || \
	  { echo 'make k8s-check needs kubectl 1.27 or newer, or kustomize 5: https://kubernetes.io/docs/tasks/tools'; exit 1; }
	@$(BIN)/python -m pytest tests/k8s --ignore tests/k8s/cluster $(ARGS)

k8s-test: gen ## Deploy to the cluster of KUBECONFIG, from HOLDFAST_IMAGE, which its nodes have, and try it
	@test -n '$(KUBECONFIG)' -a -n '$(HOLDFAST_IMAGE)' || \
	  { echo 'make k8s-test needs KUBECONFIG and HOLDFAST_IMAGE=NAME:TAG (docs/kubernetes.md, Trying it)'; exit 1; }
	@$(BIN)/python -m pytest tests/k8s/cluster -s -v $(ARGS)

lint: gen ## Check style, types, imports, contracts and dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/python -m deploy.dependencies
	@if git ls-tree -r --name-only $(BREAKING_BASE) 2>/dev/null | grep -q '^protos/'; then \
	  echo '$(BIN)/buf breaking (against $(BREAKING_BASE))'; $(BIN)/buf breaking --against '.git#ref=$(BREAKING_BASE)'; fi

format: gen ## Format the code and the contracts
	@$(BIN)/ruff check --fix-only -q .
	@$(BIN)/ruff format -q .
	@$(BIN)/buf format -w

bench: gen $(VENV)/.bench ## Measure every target: tables, .local/bench.json, .local/bench.png
	@$(BIN)/python -m bench

bench-quick: gen $(VENV)/.bench ## The same keys in under three minutes, less exact
	@$(BIN)/python -m bench --quick

capacity: gen ## What a rate of requests takes, and what breaks first: RATE=2100 SKUS=100000 SKEW=1
	@$(BIN)/python -m bench.capacity --rate $(RATE) --skus $(SKUS) --skew $(SKEW)

gen: gen/.made ## Install into .venv and generate code from the contracts

clean: ## Remove the environment, generated code and local data
	@rm -rf $(VENV) gen .local .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.made: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Holdfast needs Python 3.11 or newer: install it, or name it with PYTHON=python3.12.'; exit 1; }
	@echo 'Installing into $(VENV) (once) ...'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -c "import pathlib, site; \
	  pathlib.Path(site.getsitepackages()[0], 'holdfast.pth').write_text('$(CURDIR)\n$(CURDIR)/gen\n')"
	@touch $@

$(VENV)/.bench: $(VENV)/.made bench/requirements.lock
	@echo 'Installing what measures into $(VENV) (once) ...'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes \
	  -r requirements.lock -r bench/requirements.lock
	@touch $@

gen/.made: $(VENV)/.made $(PROTOS)
	@mkdir -p gen
	@$(BIN)/python -m grpc_tools.protoc -Iprotos --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=gen --grpc_python_out=gen --mypy_out=quiet:gen --mypy_grpc_out=quiet:gen $(PROTOS)
	@touch $@
