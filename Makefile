# make run: set everything up and run the recipe.   make test: set up and run the tests.
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
# One test process per processor, at most four, each with one torch thread; tests/conftest.py orders the files.
PYTEST := OMP_NUM_THREADS=1 python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.SILENT:
.PHONY: run test test-fast check chat ui deploy worker setup clean

run: setup
	python -m flows.recipe

test: setup
	$(PYTEST)

test-fast: setup
	$(PYTEST) -m "not slow"

check: setup
	ruff check .
	ruff format --check .
	mypy
	lint-imports

chat: setup
	python -m flows.chat

ui: setup
	python -m flows.servers

deploy worker: export PREFECT_API_URL ?= http://127.0.0.1:$(or $(PREFECT_SERVER_API_PORT),4200)/api

# The server on this machine is asked past any proxy; some libraries read the one name, some the other.
deploy worker: export no_proxy := 127.0.0.1,localhost,$(no_proxy)
deploy worker: export NO_PROXY := 127.0.0.1,localhost,$(NO_PROXY)

deploy: SECONDS_TO_ANSWER ?= 120
deploy: setup
	end=$$(($$(date +%s) + $(SECONDS_TO_ANSWER))); until prefect work-pool ls > /dev/null 2>&1; do \
		test $$(date +%s) -lt $$end || { echo "No Prefect server answers at $$PREFECT_API_URL: start one with make ui"; exit 1; }; \
		sleep 1; \
	done
	prefect work-pool inspect arriero > /dev/null 2>&1 || prefect work-pool create arriero --type process
	prefect --no-prompt deploy --all

worker: setup
	prefect worker start --pool arriero --type process

setup: $(READY)

# Two makes at once, as in `make ui & make deploy`, set up one after the other: the second finds everything done.
ifndef ALONE
$(READY): pyproject.toml constraints.txt
	python3 -c "$$LOCKED" $(MAKE) --no-print-directory --silent ALONE=1 $(READY)
else
$(READY): pyproject.toml constraints.txt
	python3 -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Arriero needs Python 3.11 or newer, this is ' + sys.version.split()[0])"
	python3 -c "import venv, ensurepip" 2> /dev/null || { echo "Python's venv module is missing: install it (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)
endif

define LOCKED
import fcntl, os, sys
file = os.open("pyproject.toml", os.O_RDWR)
fcntl.flock(file, fcntl.LOCK_EX)
os.set_inheritable(file, True)
os.execvp(sys.argv[1], sys.argv[1:])
endef
export LOCKED

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .grimp_cache
	test ! -d .scratch || echo "left: .scratch ($$(du -sh .scratch | cut -f1)), states that stopped stages resume from: python -m flows.states lists and clears them"
	test ! -d .runs || echo "left: .runs ($$(du -sh .runs | cut -f1)), records that MLflow may not have yet: dvc repro -f -s publish sends them"
