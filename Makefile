# Everything a fresh machine needs is Python 3.11, git and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Only what is imported is compiled, when it is, and once.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
# What a user needs, and what developers need beside it.
USED := $(VENV)/.installed
STAMP := $(VENV)/.installed-test

.PHONY: demo test tests test-slow test-docs bench faults docs lint dist-check compat clean

demo: $(USED)
	$(BIN)/philens demo

test: $(STAMP)
	$(MAKE) --no-print-directory -j 2 tests lint

# Two processes with a thread each: models are too small for threads to help.
tests: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# The site, the notebooks but the one that trains (test-slow), and the page in a browser.
test-docs: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m docs $$(grep -l mark.docs tests/*.py)

bench: $(STAMP)
	$(INSTALL) -e '.[bench]'
	$(BIN)/python -m benchmarks

# The site, in site/; notebooks become pages as they were run, and messages of the source a page.
docs: $(STAMP)
	$(BIN)/python -m nbconvert --log-level WARN --to markdown --output-dir docs/notebooks notebooks/*.ipynb
	sed -i 's|](../docs/|](../|g; s|\.ipynb)|.md)|g' docs/notebooks/*.md
	$(BIN)/python -m releasing.messages docs/errors/messages.md
	$(BIN)/python -m zensical build --clean --strict

# Kills, full disks, damaged files, hostile texts: a table of tried and survived. At most 30 minutes.
faults: $(STAMP)
	$(BIN)/python -m faults

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python

# Before a release: wheel and sdist in empty environments, and every extra; then old and new dependencies.
dist-check compat: $(STAMP)
	$(INSTALL) -e '.[release]'
	$(BIN)/python -m releasing $(@:-check=)

$(USED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e '.[explore,gguf]'
	touch $(USED)

$(STAMP): $(USED)
	$(INSTALL) -e '.[test]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .cache .compat docs/notebooks docs/errors/messages.md philens-demo site
