# make demo   everything from nothing: environment, install, model, data, LoRA, a table of results
# make test   the test suite
# make lint   ruff, as CI runs it
PYTHON ?= python3
VENV ?= .venv
# Processes of the test suite, at about 3 GB each.
JOBS ?= 2

.PHONY: demo test lint venv
.DELETE_ON_ERROR:

demo: venv
	$(VENV)/bin/python -m efft demo

test: venv
	$(VENV)/bin/python -m pytest -q -n $(JOBS) tests

lint: venv
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

venv: $(VENV)/installed

# Anew only when what setup.py asks for has changed; the sources are used in place.
$(VENV)/installed: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'efft needs Python 3.11 or newer; $(PYTHON) is' "$$($(PYTHON) --version 2>&1)." \
	    'Name another: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@
