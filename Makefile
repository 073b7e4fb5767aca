# `make help` lists what there is.
SHELL  := /bin/sh
PYTHON ?= python3
NAME   ?= $(if $(DATA),mine,demo)
DATA   ?=
TORCH  ?=
INDEX  ?=
ARGS   ?=
PORT   ?= 8000
PART   ?= 1/1
BIN    := .venv/bin
LOCK   := $(if $(filter cpu,$(TORCH)),lock-cpu.txt,lock.txt)
export DVC_NO_ANALYTICS = 1
export ORT_DISABLE_TELEMETRY = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1
.DEFAULT_GOAL := help
.PHONY: help run folds install test test-nightly rehearse prepare hooks serve lab lock clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 22
	@echo
	@echo "  DATA=<folder|zip>  pictures to run on (none: the demo set)     NAME=<name>   the run is runs/NAME"
	@echo "  ARGS='-p train.epochs=20'  parameters of the stages            PYTHON=python3.12"
	@echo "  TORCH=cpu INDEX=<url>      the CPU build of torch (1 GB, not 6), from the index that has it"

# The stamp holds the lock's name: another lock, or a newer one, means another environment.
.venv/.stamp-$(LOCK): $(LOCK)
	@$(PYTHON) tools/preflight.py "$(LOCK)" "$(INDEX)"
	@$(PYTHON) tools/install.py "$(LOCK)" "$(INDEX)"
	@touch $@

install: .venv/.stamp-$(LOCK) ## build .venv from the lock

run: install ## demo or DATA=<folder>: prepare, train, export, evaluate, ask the service
	@$(BIN)/defect-detect run pipeline $(NAME) $(if $(DATA),--data "$(DATA)") --ask $(ARGS)

folds: install ## train once for each of five folds of parts, going on where it stopped; the files go to models/NAME-folds
	@$(BIN)/defect-detect run folds $(NAME) $(if $(DATA),--data "$(DATA)") $(ARGS)

test: install ## every test, with counts
	@$(BIN)/python tools/test.py $(ARGS)

test-nightly: install ## the long tests; PART=2/4 is the second of four parts
	@$(BIN)/python -m pytest -q -p no:cacheprovider --color=no --durations=10 --nightly "$(PART)" tests

rehearse: install ## the way from a changed parameter to production and back, played in a temporary repository
	@$(BIN)/defect-detect release rehearse $(ARGS)

prepare: install ## before a commit: clean, export, README, tests of what changed
	@$(BIN)/python tools/prepare.py

hooks: install ## once in a clone: check on commit, merge notebooks cell by cell
	@git config --local include.path ../.gitconfig
	@echo "commits check the notebooks; merges go cell by cell; the library is exported after a merge"

serve: install ## serve the bundle of runs/NAME on PORT
	@$(BIN)/defect-detect serve runs/$(NAME)/export/bundle --port $(PORT)

lab: install ## open the notebooks
	@$(BIN)/jupyter lab nbs

lock: install ## renew lock.txt, lock-cpu.txt and docker/serve.lock from constraints.txt
	@$(BIN)/python tools/lock.py $(INDEX)

clean: ## remove .venv, runs, demo data and caches
	rm -rf .venv runs data/demo data/demo.json _proc _docs dist build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Taken once from the index that is named: its hashes are known to nobody else.
lock-cpu.txt:
	@$(PYTHON) tools/lock.py --cpu "$(INDEX)"
