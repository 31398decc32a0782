# Everything runs in .venv, which these targets create: python3, make and a C compiler are enough.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test check format clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[host,onnxruntime,openvino,tensorrt-rtx,dev]"
	touch $@

demo: $(READY)
	$(BIN)/python -m benchmarks.demo

test: $(READY)
	# One thread: tiny networks are slower with two, and the tests measure no time.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache
