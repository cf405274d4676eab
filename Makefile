# Every target sets up what it needs; the second time is quick.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q $(PIP_ARGS)
# On a machine with an NVIDIA GPU, the torch that is already there. Elsewhere this version from the index that pip is
# configured with; on Linux the default index has the CUDA build (several GB). For the CPU build name it and pytorch's index:
#   make TORCH=torch==2.13.0+cpu PIP_ARGS="--extra-index-url ..."
TORCH ?= torch==2.13.0
PIP_ARGS ?=
EXTRAS ?= test,demo,triton,dev
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.inc csrc/*/*.cu csrc/*/*.cuh)

.PHONY: setup demo test test-slow bench lint format device-check wheel clean

setup: build/.installed

# Written last, so that a run that broke off (no network, no disk) is taken up again.
$(VENV)/.ready:
	$(PYTHON) -m venv $(if $(shell $(PYTHON) -c 'import torch; print(torch.cuda.is_available() or "")' 2>/dev/null),--system-site-packages,) $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || $(PIP) "$(TORCH)"
	$(PIP) "setuptools>=77" wheel "pybind11>=2.13" ninja
	@touch $@

# The Python part is used in place; only a change of the compiled part or of the packaging builds again.
build/.installed: $(VENV)/.ready $(SOURCES)
	$(PIP) --no-build-isolation -e ".[$(EXTRAS)]"
	@mkdir -p build && touch $@

demo: setup
	$(PY) examples/language_model.py
	$(PY) examples/contrastive_digits.py --quick

test: setup
	$(PY) -m pytest -q -m "not slow"
	$(PY) -m pytest -q tests/triton

test-slow: setup
	$(PY) -m pytest -q -m slow

bench: setup
	$(PY) -m pytest -q bench

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files -co --exclude-standard 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inc' 'csrc/*.cu' 'csrc/*.cuh')

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inc' 'csrc/*.cu' 'csrc/*.cuh')

wheel:
	$(PYTHON) -m pip wheel -q --no-deps -w dist .

device-check:
	$(PYTHON) bench/device_check.py

clean:
	rm -rf build dist $(VENV) demo_out
