# `make demo` and `make test` need nothing but Python 3.11 or newer, git and make.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e
# Without budget, which takes hours: python -m benchmarks.budget --json benchmarks/results/budget.json
BENCHMARKS := startup pipeline train memory inference serving gpu
# Path of train.py of pytorch-image-models; without it, training is measured beside the other peers alone.
TIMM_SCRIPT ?=

.PHONY: demo test test-slow test-gpu check docs bench

demo: $(VENV)/.installed-demo
	$(VENV)/bin/fieldmark demo

test: $(VENV)/.installed-test
	$(RUN) -m pytest

test-slow: $(VENV)/.installed-test
	$(RUN) -m pytest -m slow

test-gpu: $(VENV)/.installed-test
	$(RUN) -m pytest -m gpu

check: $(VENV)/.installed-test
	scripts/check

docs: $(VENV)/.installed-docs
	scripts/docs

bench: $(VENV)/.installed-bench
	for name in $(BENCHMARKS); do \
	  case $$name in train|gpu) more="$(TIMM_SCRIPT:%=--timm-script %)";; *) more=;; esac; \
	  $(RUN) -m benchmarks.$$name $$more --json benchmarks/results/$$name.json || exit 1; \
	done
	$(RUN) -m benchmarks.tables
	$(RUN) -m benchmarks.scale

# The stamps make an installation happen once, and again when what is asked for changes.
$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(RUN)
	$(INSTALL) '.[demo]'
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(RUN)
	$(INSTALL) '.[test]'
	touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(RUN)
	$(INSTALL) '.[docs]'
	touch $@

$(VENV)/.installed-bench: pyproject.toml constraints.txt | $(RUN)
	$(INSTALL) '.[test,bench]'
	touch $@ $(VENV)/.installed-test $(VENV)/.installed-demo

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Fieldmark needs Python 3.11 or newer; name one with: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
