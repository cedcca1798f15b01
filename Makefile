PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
DATA := data/quickstart
RUN := runs/quickstart

# Python compiles what is imported; pip would compile all that it installs, for most of a minute.
export PIP_NO_COMPILE := 1
# Training allocates anew at each step: with huge pages that costs half of the system's time (13 -> 8 s in 60 steps).
quickstart: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

.PHONY: quickstart test lint format newest-jax kernels-check clean

# Synthesises conversations, tokenises them, trains a small Moshi with TTT layers and reports on held-out voices.
quickstart: $(INSTALLED)
	$(BIN)/python -m ttt_jax.data.conversations --hours=6 --min_minutes=5 --max_minutes=12 --seed=0 --output=$(DATA)
	$(BIN)/python train.py --config=configs/quickstart.py --workdir=$(RUN) --config.data.directory=$(DATA)
	$(BIN)/python eval.py --workdir=$(RUN) --benchmark=nll_by_position
	@echo "report:       $(RUN)/report.html"
	@echo "continuation: $(RUN)/continuation.wav"

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The operation needs JAX alone, so those of its tests that use most of JAX run on the newest release.
newest-jax:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --upgrade jax pytest pytest-xdist
	PYTHONPATH=.:kernels .venv-newest/bin/python -m pytest tests/ttt -n 2 -p no:cacheprovider \
	  -k "goldens or api or agree or any_split or vmap"

# Compiles the GPU kernels for an H100, which need not be there, and holds registers, spills and the like to a table.
kernels-check: $(INSTALLED)
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt --upgrade --target .venv-h100 \
	  jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm
	PYTHONPATH=.venv-h100 $(BIN)/python -m ttt_kernels.check

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "Python 3.12 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

clean:
	rm -rf .venv .venv-newest .venv-h100 $(RUN) $(DATA)
