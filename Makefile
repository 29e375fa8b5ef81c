# make demo | test | fuzz | kernels | rehearse | check | bench: each sets up its own virtual environment first; nothing else is needed than
# Python 3.11+, git, make and a C compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := client,coordinator,central,demo,dev
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false
unexport PYTHONDONTWRITEBYTECODE   # tests start many processes: each would compile our packages again

.PHONY: install demo test fuzz kernels rehearse check format bench protos clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)
	$(BIN)/fedpeft demo

# Unit tests on every core, one compute thread each; then the tests with real processes, one more at once than cores, since they often wait.
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m 'not gpu and not slow and not integration' tests/unit
	$(BIN)/python -m pytest -n $$(($$(env -u OMP_NUM_THREADS nproc) + 1)) --dist loadgroup --no-loadscope-reorder -m 'integration and not gpu and not slow' tests/integration tests/unit/control

# The unit tests with other examples in every run. What it finds becomes an `@example` of the test, or a test of its own.
fuzz: export OMP_NUM_THREADS ?= 1
fuzz: export FEDPEFT_HYPOTHESIS = search
fuzz: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m 'not gpu and not slow and not integration' tests/unit

# The Triton kernels without a card: their values under Triton's interpreter, then machine code for cards from its compiler.
# Multiply-adds are fused, as on cards; Triton 3.9 warns where that is not said.
kernels: export OMP_NUM_THREADS ?= 1
kernels: export TRITON_DEFAULT_FP_FUSION ?= 1
kernels: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[kernels]'
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/unit/mixtures/test_kernels.py tests/unit/mixtures/test_products.py
	$(BIN)/python -m pytest tests/unit/mixtures/test_kernels.py

# The tests of a card on a CPU, in the types that the card computes in, its Triton kernels interpreted.
rehearse: export OMP_NUM_THREADS ?= 1
rehearse: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[kernels]'
	FEDPEFT_REHEARSE=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -m gpu tests/gpu

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python protos/generate.py --check

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(STAMP)
	$(BIN)/python protos/generate.py

bench: $(STAMP)
	$(BIN)/python -m tests.bench

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
