# Each target works as the first command in a fresh clone, with Python >= 3.11, pip and make.
#
#   make demo    set up .venv, build SM90 kernels; run them on the GPU if there is one, else one of them on the CPU
#   make test    set up .venv, lint, type-check, run the tests
#   make docs    set up .venv, build the documentation into site/
#
# Variables: PYTHON (the interpreter that makes .venv), TORCH (what pip is asked for; empty: none),
# VENV_ARGS (--system-site-packages, with TORCH empty, takes a torch that is installed already), ARGS (more for pytest).

PYTHON    ?= python3
TORCH     ?= torch==2.13.0
VENV_ARGS ?=
ARGS      ?=

VENV := .venv
BIN  := $(VENV)/bin
# The outer pip fills .venv: a Debian python3 without python3-venv cannot put a pip inside.
PIP  := $(PYTHON) -m pip --python $(BIN)/python --disable-pip-version-check --quiet

# Runs $(2) with a line every five seconds that it goes on with $(1): pip says nothing while it downloads.
define told
@echo "$(1)"; (while sleep 5 >/dev/null 2>&1; do echo "still $(1)"; done) & teller=$$!; trap "kill $$teller" EXIT; $(2)
endef

.PHONY: demo test docs clean

demo: $(VENV)/.stamp-demo
	$(BIN)/fa2gen build --arch sm90 --head-dim 64 --head-dim 128
	@$(BIN)/fa2gen verify --arch sm90 --head-dim 64 --head-dim 128; status=$$?; \
	if [ $$status -ne 3 ]; then exit $$status; fi; \
	$(BIN)/python examples/run_on_cpu.py; status=$$?; \
	if [ $$status -ne 3 ]; then exit $$status; fi; \
	echo "The kernels are built; none was run, for the reasons above."

test: $(VENV)/.stamp-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -n 2 $(ARGS)

docs: $(VENV)/.stamp-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

$(BIN)/python:
	$(call told,making $(VENV),\
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV) || $(PYTHON) -m venv $(VENV_ARGS) --without-pip $(VENV))

# Building kernels needs no torch; running them does. So the demo installs one only where a GPU is.
$(VENV)/.stamp-demo: pyproject.toml | $(BIN)/python
	$(call told,installing,$(PIP) install $(if $(shell command -v nvidia-smi),$(TORCH)) --editable .)
	@touch $@

$(VENV)/.stamp-test: pyproject.toml | $(BIN)/python
	$(call told,installing,$(PIP) install $(TORCH) --editable '.[test]')
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache dist site
