# make annotate SPLIT=train   set up what is missing, then annotate a split
# make test                   set up what is missing, then run the tests
# make help                   the other targets
SHELL       := /bin/bash
PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS      ?= annotate,sample,dev
SPLIT       ?= train
CONFIG      ?= configs/sample.yaml
OUT         ?= labels
DATA        ?=
ARGS        ?=

BIN := $(VENV)/bin
# Named after what was installed, so that a changed requirement or a new module installs again and
# anything else (a fresh checkout's time stamps, say) does not.
STAMP := $(VENV)/installed-$(shell { cat pyproject.toml $(CONSTRAINTS); echo '$(EXTRAS)'; ls *.py */*.py */*/*.py */*/assets/*; } 2>/dev/null | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help setup annotate test test-faults soak check format clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(STAMP)  ## create .venv and install tokenlabel with its extras

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "tokenlabel needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Remedy: make PYTHON=python3.11 …" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing tokenlabel into $(VENV) (once; a few minutes with a fast network) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) \
		--config-settings editable_mode=strict -e '.[$(EXTRAS)]'
	@rm -f $(VENV)/installed-* && touch $@

annotate: $(STAMP)  ## annotate SPLIT of DATA (default: the embedded sample) into OUT with CONFIG
	@$(BIN)/python cli.py annotate --config '$(CONFIG)' --split '$(SPLIT)' --out '$(OUT)' \
		$(if $(DATA),--data '$(DATA)') $(ARGS)

# Two processes, each of whole modules, so that a module's labels are made once.
test: $(STAMP)  ## run all tests but those of test-faults (9 minutes on 2 cores)
	@$(BIN)/python -m pytest --ignore tests/faults --numprocesses 2 --dist loadfile $(ARGS)

test-faults: $(STAMP)  ## kill jobs, fail disks, read hostile files (15 minutes)
	@$(BIN)/python -m pytest tests/faults $(ARGS)

soak: $(STAMP)  ## the faults again and again, for up to an hour; writes the results to soak.md
	@$(BIN)/python -m pytest tests/faults --soak --table soak.md $(ARGS)

check: $(STAMP)  ## lint, formatting, types, and who imports whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy -p tokenlabel
	@$(BIN)/lint-imports

format: $(STAMP)  ## format the code and fix what ruff can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove what make and the tools made (labels/ and data/ stay)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
