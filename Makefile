# make train | test | test-faults | lint: everything else, the virtual environment included, follows.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/*/*)

.PHONY: train test test-faults lint clean

train: $(VENV)/.installed
	$(BIN)/python train.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

test-faults: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m faults -s

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"MCIC needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}: try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first: what is built against it must find it.
$(VENV)/.torch: $(VENV)/.created constraints.txt
	@echo "Installing PyTorch (once)"
	$(INSTALL) torch setuptools ninja pybind11
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(INSTALL) --no-build-isolation --editable '.[lite]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(INSTALL) --no-build-isolation --editable '.[lite,test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info kernels/_C.*.so kernels/_build.json
