# `make demo`, `make test` and `make docs` do all their own set-up in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt

.PHONY: demo test check optimized clients servers ray examples notebooks docs clean

# `make demo MODEL=Qwen/Qwen3-Reranker-0.6B` runs the real model, and says what to install where it is missing.
demo: $(VENV)/.demo
	$(BIN)/qwen-rerank demo $(if $(MODEL),--model $(MODEL))

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The fast tests once more without `assert` statements: every check in the package must still hold.
optimized: $(VENV)/.dev
	$(BIN)/python -O -W ignore::pytest.PytestConfigWarning -m pytest -q -m 'not network and not gpu and not slow and not clients and not servers and not browser and not ray and not examples and not heavy'

# Real client packages against the server, in environments of their own under build/clients; ONLY='cohere/' takes some.
clients: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m clients tests/clients $(if $(ONLY),-k '$(ONLY)')

# The client and `check` against real servers (vLLM, llama.cpp, Infinity, Xinference), in environments under build/servers: 6 GB.
servers: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m servers tests/servers

# Bulk jobs and the server on a real Ray of two CPUs on this machine: workers killed, a driver killed, a rolling restart.
ray: $(VENV)/.dev
	RAY_USAGE_STATS_ENABLED=0 $(BIN)/python -m pytest -q -m ray tests/on_ray

# Every example as a program, as it is and with one's own texts, and the pictures of what they print.
examples: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m examples tests/test_examples.py tests/training/test_example.py

# Execute every notebook from an empty folder and see that the committed ones are made from their sources.
notebooks: $(VENV)/.dev
	$(BIN)/python notebooks/build.py --check

# The documentation in both languages, into site/; a warning or a dead link is an error.
docs: $(VENV)/.docs
	$(BIN)/python -m docs.build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The demo's pair runs on ONNX Runtime: no torch. Python compiles what the demo imports, not every module that is installed.
$(VENV)/.demo: pyproject.toml constraints-cpu.txt | $(VENV)/bin/python
	$(PIP) --no-compile -e '.[faiss-cpu]'
	touch $@

# torch first: the pin decides which build everything else is resolved against.
$(VENV)/.dev: pyproject.toml constraints-cpu.txt | $(VENV)/bin/python
	$(PIP) torch==2.13.0
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/.demo

# Pages are drawn from the code: the server's part of the package, and the generator of the site.
$(VENV)/.docs: pyproject.toml constraints-cpu.txt | $(VENV)/bin/python
	$(PIP) -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
