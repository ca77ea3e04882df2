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
REPORT = $(RUN) -m bench report $(RESULTS)/*/benchmarks.json $(if $(README),--readme $(README))
.PHONY: demo test harness lint docs bench bench-report bench-check gpu gpu-replica install clean

demo: $(VENV)/.installed-demo
	$(BIN)/layalign demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile

# lm-evaluation-harness in the same environment, 340 MB more, and the tests that need it.
harness: $(VENV)/.installed-test $(VENV)/.installed-lm-eval
	$(BIN)/python -m pytest tests/harness

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

# Everything that a machine with a GPU can say, in three stages; a second run goes on where the first ended. FROM=B, TO=B: a part;
# ONLY=smoke,kernels: steps. BEFORE: a folder with what an earlier run, on a machine that is gone, left. FRESH=1 begins anew.
FROM ?= A
TO ?= C
ONLY ?=
BEFORE ?=
FRESH ?=
A_SECONDS ?= 540
B_SECONDS ?= 540
C_SECONDS ?= 540
JOBS ?= 16
GPU_WORKERS ?= 8
STAGES = --from $(FROM) --to $(TO) --a-seconds $(A_SECONDS) --b-seconds $(B_SECONDS) --c-seconds $(C_SECONDS)
FIRST_LIGHT = -m bench.first_light --results $(RESULTS) $(STAGES) --jobs $(JOBS) --workers $(GPU_WORKERS) \
  $(if $(ONLY),--only "$(ONLY)") $(if $(BEFORE),--before $(BEFORE)) $(if $(FRESH),--fresh)
gpu: $(READY)
	$(RUN) $(FIRST_LIGHT)

# The same on a pretended GPU, in an environment that holds what a GPU's image may and nothing else: whether it would run at all.
REPLICA ?= .venv-replica
REPLICA_TORCH ?= 2.11.0
REPLICA_TRITON ?= 3.6.0
REPLICA_TRANSFORMERS ?= 5.17.0
REHEARSED ?= runs/rehearsal
FAULTS ?= stream_linear=resources,attention backward=wrong,decode=kills,layer_mix=hangs
gpu-replica: $(REPLICA)/.installed
	@# It ends with status 1: the faults are found, and stand in the table.
	$(REPLICA)/bin/python -m bench.first_light --rehearse "$(FAULTS)" --results $(REHEARSED) --workers 2 --fresh --limit 30 || test $$? = 1

$(REPLICA)/.installed:
	test -x $(REPLICA)/bin/python || $(PYTHON) -m venv $(REPLICA)
	$(REPLICA)/bin/python -c "import torch" 2>/dev/null || $(REPLICA)/bin/pip install -q "torch==$(REPLICA_TORCH)+cpu" 2>/dev/null || \
	  $(REPLICA)/bin/pip install -q "torch==$(TORCH)+cpu"
	$(REPLICA)/bin/pip install -q --no-deps "triton==$(REPLICA_TRITON)"
	$(REPLICA)/bin/pip install -q "transformers==$(REPLICA_TRANSFORMERS)" tqdm typer pytest pytest-benchmark hypothesis matplotlib
	$(REPLICA)/bin/python -c "import torch, triton, transformers as t; print('replica: torch', torch.__version__, 'triton', triton.__version__, 'transformers', t.__version__)"
	touch $@

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
