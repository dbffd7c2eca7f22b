# `make demo` shows a paid prompt from beginning to end; `make test` proves everything.
# Both make what they need in .venv the first time; llama.cpp is compiled once (two to seven minutes).

PYTHON ?= $(shell for p in python3.12 python3.11 python3; do command -v $$p >/dev/null && \
	$$p -c 'import sys; sys.exit(not (3,11) <= sys.version_info < (3,13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR ?= .satherd/demo

.PHONY: demo up test lint bench bench-peers chaos soak clean help

demo: $(VENV)/.engine ## play the whole paid story once
	@$(BIN)/satherd demo --data-dir $(DEMO_DIR)

up: $(VENV)/.engine ## run everything on this machine until Ctrl-C
	@$(BIN)/satherd up

test: $(VENV)/.dev ## lint, types, import contracts, all tests
	@$(MAKE) --no-print-directory lint
	PYTHONDONTWRITEBYTECODE= SATHERD_TEST_HORDE_SDK=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup

lint: $(VENV)/.dev ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

bench: $(VENV)/.dev ## measure; docs/performance.md quotes it
	$(BIN)/python -m bench.run

bench-peers: $(VENV)/.dev ## beside other gateways and queues, which it installs below .cache
	$(BIN)/python -m bench.peers

chaos: $(VENV)/.dev ## kill -9 at random moments under load, and check the books (CHAOS="--minutes 30")
	$(BIN)/python -m bench.chaos $(CHAOS)

soak: $(VENV)/.dev ## 1,000 payouts over real channels under kill -9 (SOAK="--payouts 100"); wants electrum
	$(BIN)/python -m bench.soak $(SOAK)

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Satherd needs Python 3.11 or 3.12 (apt-get install python3-venv)"; exit 1; }
	@echo "making $(VENV) with $(PYTHON) and installing what Satherd needs (a minute, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[router]'
	@touch $@

$(VENV)/.engine: $(VENV)/.installed
	@$(BIN)/python -m worker.llama_install
	@touch $@

$(VENV)/.dev: $(VENV)/.engine
	@echo "installing what the tests need"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[router,dev]'
	@touch $@

clean: ## remove the environment and the demo's state
	rm -rf $(VENV) .satherd

help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'
