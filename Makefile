# make demo   the whole chain on synthetic scenes      make test       lint, types, fast tests
# make test-slow   the long tests                      make clean      remove .venv and outputs
# Everything is installed into .venv in this folder, once, from requirements.lock (hashes checked).

PYTHON ?= python3
BIN := .venv/bin
OUT ?= out/demo

.PHONY: demo test test-slow lint setup clean lock

demo: setup
	$(BIN)/distill demo out=$(OUT)

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: Python 3.11 or newer is needed, '$(PYTHON)' is" \
	  "$$($(PYTHON) --version 2>&1 || true). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: this Python has no venv module. On Debian: apt install python3-venv"; exit 2; }
	@test -d .venv/bin || $(PYTHON) -c 'import shutil, sys; sys.exit(shutil.disk_usage(".").free < 9e9)' || { \
	  echo "make: less than 9 GB free here; the packages need that much. Free some space" \
	  "or clone to another disk."; exit 3; }
	@echo "Installing into .venv (several GB, some minutes, once) ..."
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --no-deps --require-hashes -r requirements.lock
	@$(BIN)/pip install -qq --no-deps --no-build-isolation -e .
	@touch $@

lock:
	$(PYTHON) -m pip install --quiet uv
	echo onnxconverter-common | uv pip compile pyproject.toml - --extra dev --extra scenes --extra precision \
	  --universal --python-version 3.11 --generate-hashes --no-header --quiet -o requirements.lock

clean:
	rm -rf .venv out
