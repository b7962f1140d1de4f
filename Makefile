# make demo   everything from nothing: environment, install, model, data, LoRA, a table of results
# make test   the test suite
# make peers  tests beside PyTorch, transformers, HF PEFT and AdapterHub (Python 3.11)
# make lint   ruff, as CI runs it
PYTHON ?= python3
VENV ?= .venv
# Processes of the test suite, at about 3 GB each.
JOBS ?= 2
# Of tests with many parameters, every n-th.
EVERY ?= 1

.PHONY: demo test peers lint venv
.DELETE_ON_ERROR:

demo: venv
	$(VENV)/bin/python -m efft demo

test: venv
	$(VENV)/bin/python -m pytest -q -n $(JOBS) --every=$(EVERY) tests

# Two environments, because AdapterHub wants an older transformers than efft.
PEERS := $(VENV)-peft $(VENV)-adapterhub
peers: $(PEERS:%=%/installed)
	$(VENV)-peft/bin/python -m pytest -q --disable-warnings tests/peers --ignore=tests/peers/test_live_adapterhub.py \
	  tests/test_arithmetic.py tests/test_convert.py tests/test_losses.py
	$(VENV)-adapterhub/bin/python -m pytest -q --disable-warnings tests/peers/test_live_adapterhub.py \
	  tests/peers/test_live_hf.py

$(VENV)-peft/installed: setup.py tests/peers/requirements.txt
	$(PYTHON) -m venv $(VENV)-peft
	$(VENV)-peft/bin/python -m pip install -q --disable-pip-version-check \
	  -r tests/peers/requirements.txt -e '.[test]'
	@touch $@

$(VENV)-adapterhub/installed: tests/peers/requirements-adapterhub.txt
	$(PYTHON) -m venv $(VENV)-adapterhub
	$(VENV)-adapterhub/bin/python -m pip install -q --disable-pip-version-check -r $<
	@touch $@

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
