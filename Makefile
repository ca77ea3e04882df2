# `make demo` and `make test` work on a fresh machine: they make .venv and install into it first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= 2.13.0
# Linux without an NVIDIA GPU gets PyTorch's CPU build: the default build brings gigabytes of CUDA packages.
CPU_ONLY ?= $(shell [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 && echo 1)

.PHONY: demo test gpu-tests lint install clean

demo: install
	$(BIN)/layalign demo

test: install
	$(BIN)/python -m pytest -n auto --dist loadfile

# On a machine with a GPU: what needs one, then the operators' tests on compiled kernels.
gpu-tests: install
	$(BIN)/python -m pytest -m gpu tests
	$(BIN)/python -m pytest tests/kernels -m "not gpu and not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/.installed

$(VENV)/.installed: setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(CPU_ONLY),1)
	@# pip takes the CPU build where its configuration has one; elsewhere uv knows where PyTorch keeps it.
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "torch==$(TORCH)+cpu" 2>/dev/null || \
	  { $(BIN)/pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend cpu "torch==$(TORCH)"; }
endif
	$(BIN)/pip install -q -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
