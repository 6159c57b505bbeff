# Everything a fresh machine needs is one of these targets; each makes $(VENV) when it is missing.
#
#   make demo    the layer, checked and timed: on a supported GPU at full size, else on a small layer
#   make test    the tests this machine can run, and a list of what was skipped and why
#   make lint    ruff check, ruff format --check, mypy
#   make bench   the speed table of the six benchmark shapes (supported GPU only)
#   make clean   remove $(VENV) and everything that was generated
#
# PYTHON  the interpreter that makes $(VENV)
# TORCH   the torch requirement, installed first; TORCH="torch==2.13.0" chooses a build by version
# EXTRAS  further extras of the package, e.g. EXTRAS=cu13 (see "Install" in README.md)

PYTHON ?= python3
TORCH ?= torch>=2.9
EXTRAS ?=
VENV ?= .venv

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
comma := ,
WITH_EXTRAS = .[$(1)$(if $(strip $(EXTRAS)),$(comma)$(strip $(EXTRAS)))]

.PHONY: demo test lint bench clean
.DEFAULT_GOAL := test

demo: $(VENV)/.test
	$(PY) benchmarks/moe-cute.py

test: $(VENV)/.test
	$(PY) -m pytest tests

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(VENV)/.test
	$(PY) benchmarks/validate.py --parts speed --name bench

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One file for each value of the variables, so that installations are repeated when one changes.
STAMP := $(shell printf '%s|%s|%s' '$(PYTHON)' '$(TORCH)' '$(strip $(EXTRAS))' | cksum | cut -d' ' -f1)
CHOSEN := $(VENV)/.chosen-$(STAMP)

$(CHOSEN):
	mkdir -p $(VENV)
	rm -f $(VENV)/.chosen-*
	touch $@

# Keeping torch's exact version as a constraint means that nothing installed later can replace the
# build chosen here (a CPU build, say) with another one.
$(VENV)/constraints.txt: $(CHOSEN)
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PY) -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $@.new
	mv $@.new $@

$(VENV)/.test: $(VENV)/constraints.txt pyproject.toml
	$(PIP) -c $< -e "$(call WITH_EXTRAS,test)"
	touch $@

$(VENV)/.dev: $(VENV)/constraints.txt pyproject.toml
	$(PIP) -c $< -e "$(call WITH_EXTRAS,dev)"
	touch $@
