# make setup   the environment alone
# make demo    set up, then the main job: SmolLM2 compressed, built, served by the real Triton, and asked a question
# make test    set up, then every test
# make gpu     the tests that need an NVIDIA GPU, on a host that has one
# make lint    ruff and mypy
.PHONY: setup demo test unit gpu lint clean
VENV ?= .venv
RUN = $(VENV)/bin

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt scripts/setup
	scripts/setup $(VENV)

demo: setup
	$(RUN)/python examples/demo.py

test: setup
	$(RUN)/python examples/smollm2_checkpoint.py
	$(RUN)/python -m pytest

unit: setup
	$(RUN)/python -m pytest -m "not smollm2 and not triton and not container" tests/core

gpu: setup
	$(RUN)/python -m pytest -m gpu tests/runtime

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
