# `make demo` and `make test` work on a fresh machine: they make .venv and install what they need into it first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= 2.13.0
# Linux without an NVIDIA GPU gets PyTorch's CPU build: the default build brings gigabytes of CUDA packages.
CPU_ONLY ?= $(shell [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1 && echo 1)

# `make gpu SYSTEM=1` takes python3 and its packages as they are: for machines on which nothing can be installed.
SYSTEM ?=
ifeq ($(SYSTEM),1)
export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
RUN := $(PYTHON)
READY :=
else
RUN := $(BIN)/python
READY := $(VENV)/.installed-test
endif
RESULTS ?= bench/results
BENCH ?=  # further options of `pytest bench/`, such as --full
SUITES ?= bench/
TOLERANCE ?= 0.10
README ?=  # README=docs/benchmarks.md writes that page's section of results too
GPU_WORKERS ?= 4
REPORT = $(RUN) -m bench report $(RESULTS)/*/benchmarks.json $(if $(README),--readme $(README))
# Suites in the order in which their figures are missed most, should a run be cut.
FIRST := $(wildcard bench/test_attention.py bench/test_decode.py bench/test_model.py)
GPU_SUITES := $(FIRST) $(filter-out $(FIRST),$(wildcard bench/test_*.py))

.PHONY: demo test lint docs bench bench-report bench-check gpu gpu-tests gpu-bench gpu-sanitize install clean

demo: $(VENV)/.installed-demo
	$(BIN)/layalign demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile

# Types of the public modules only: [tool.mypy] lists them.
lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site into runs/site; a broken link or reference fails.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Rows are kept as soon as they are measured, and reported of even where one fails.
bench: $(READY)
	status=0; $(RUN) -m pytest $(SUITES) $(BENCH) --record $(RESULTS) || status=$$?; \
	$(REPORT) && exit $$status

bench-report: $(READY)
	$(REPORT)

# Fails where a row of ours is a tenth slower than recorded, in two runs; ratios are to the yardstick of the same run.
NOW := runs/bench
CHECK = $(RUN) -m bench check --against $(RESULTS) --tolerance $(TOLERANCE)
bench-check: $(READY)
	mkdir -p $(NOW) && rm -f $(NOW)/*
	$(RUN) -m pytest $(SUITES) $(BENCH) --benchmark-json=$(NOW)/now.json
	$(CHECK) $(NOW)/now.json --failing $(NOW)/slower.txt || \
	  { test -s $(NOW)/slower.txt && echo "measuring the slower rows again" && \
	    $(RUN) -m pytest @$(NOW)/slower.txt $(BENCH) --benchmark-json=$(NOW)/again.json && \
	    $(CHECK) --partial $(NOW)/again.json; }

# Everything that a machine with a GPU can say. Each part can be made alone, and none waits for another to pass.
gpu: $(READY)
	status=0; for part in gpu-tests gpu-bench gpu-sanitize; do $(MAKE) $$part || status=$$?; done; exit $$status

# What needs a GPU, then the operators' tests on compiled kernels.
gpu-tests: $(READY)
	status=0; $(RUN) -m pytest -m gpu -k "not compute_sanitizer" tests || status=$$?; \
	$(RUN) -m pytest tests/kernels -m "not gpu and not slow" -n $(GPU_WORKERS) --dist loadfile || status=$$?; exit $$status

gpu-bench: $(READY)
	status=0; $(RUN) -m pytest $(GPU_SUITES) --full $(BENCH) --record $(RESULTS) || status=$$?; \
	$(REPORT) && exit $$status

# Small calls of the kernels under memcheck and racecheck; says so where compute-sanitizer is not installed.
gpu-sanitize: $(READY)
	$(RUN) -m pytest tests/kernels -m gpu -k compute_sanitizer

install: $(VENV)/.installed-test

# One environment; each target adds its extra of pyproject.toml. Several at a time would install over each other.
.NOTPARALLEL:
$(VENV)/.installed-%: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(CPU_ONLY),1)
	@# pip takes the CPU build where its configuration has one; elsewhere uv knows where PyTorch keeps it.
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "torch==$(TORCH)+cpu" 2>/dev/null || \
	  { $(BIN)/pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend cpu "torch==$(TORCH)"; }
endif
	$(BIN)/pip install -q -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist runs/site *.egg-info
