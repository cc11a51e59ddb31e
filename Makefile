# `make quickstart` and `make test` are all a newcomer needs; both make .venv first and are safe to repeat.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: oldest quickstart emoji bench docs site test road slow check lint types clean

quickstart: .venv/ready
	$(BIN)/sana-lab ablate quickstart

emoji: .venv/ready  # real pictures, from the archives that docs/emoji.md says how to fetch
	$(BIN)/sana-lab ablate emoji_autoencoder

bench: .venv/ready  # against diffusers on this machine's CPU, in about twelve minutes; wants the machine to itself
	$(BIN)/python benchmarks/cpu.py

docs: .venv/ready  # pages that are generated from the source
	$(BIN)/python -m sana_lab.config.options_page

site: .venv/ready  # documentation as a site with API pages, into site/
	$(BIN)/python -m pip install --quiet "mkdocs-material>=9.7,<10" "mkdocstrings-python>=2"
	$(BIN)/python -m mkdocs build --strict --quiet

test: .venv/ready  # one process per core
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not gpu and not network and not slow"

road: .venv/ready  # the slow tests of a kill in mid-sweep, of MLflow's server and of the wheel
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow tests/test_road.py tests/tracking tests/test_wheel.py

slow: .venv/ready
	$(BIN)/python -m pytest -m "slow and not gpu and not network"

oldest: .venv-oldest/ready  # the oldest supported torch: imports, kernels in the interpreter, benchmark cases, a tiny training
	.venv-oldest/bin/python -m pytest -n auto --dist worksteal -m "not gpu and not network and not slow" \
		tests/ops tests/test_benchmarks.py tests/test_api.py tests/training/test_train.py

.venv-oldest/ready: pyproject.toml constraints.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	grep -vE "^(torch|torchvision|triton)==" constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt "torch==2.11.*" "torchvision==0.26.*" --editable ".[dev]"
	touch .venv-oldest/ready

check: lint types test

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch .venv/ready

clean:
	rm -rf .venv runs build dist
