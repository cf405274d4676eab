# Every target sets up what it needs; the second time is quick.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# A CPU build of torch by exact version; on a machine with an NVIDIA GPU, the torch that is already there.
TORCH ?= torch==2.13.0
EXTRAS ?= test,demo,triton,dev
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.inc csrc/*/*.cu csrc/*/*.cuh)

.PHONY: setup demo test test-slow bench lint format device-check wheel clean

setup: build/.installed

$(PY):
	$(PYTHON) -m venv $(if $(shell $(PYTHON) -c 'import torch; print(torch.cuda.is_available() or "")' 2>/dev/null),--system-site-packages,) $(VENV)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install -q "$(TORCH)"
	$(PY) -m pip install -q "setuptools>=77" wheel "pybind11>=2.13" ninja

# The Python part is used in place; only a change of the compiled part or of the packaging builds again.
build/.installed: $(PY) $(SOURCES)
	$(PY) -m pip install -q --no-build-isolation -e ".[$(EXTRAS)]"
	@mkdir -p build && touch $@

demo: setup
	$(PY) examples/language_model.py

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
