# `make bench` and `make test` do everything from a fresh clone: environment, build, run.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
MAX_JOBS ?= 2
export MAX_JOBS
# The CUDA kernels are built wherever nvcc is, without a GPU too: their compilation is part of what is tested.
TEST_CUDA_ARCHITECTURES ?= 9.0
# What is missing fails its tests instead of skipping them.
REQUIRED = SEGATTN_REQUIRE_INTEROP=1 SEGATTN_REQUIRE_HEADERS=1 SEGATTN_REQUIRE_SANITIZERS=1 SEGATTN_REQUIRE_DOCS=1

.PHONY: bench test docs fuzz sanitize mutate reliability environment build wheels lint format clean

bench: build
	$(BIN)/python -m benchmarks

test: build $(VENV)/.interop $(VENV)/.docs build/torch_headers/.complete
	$(REQUIRED) $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# The site, into build/site; its warnings are errors. The variable turns off a notice about other software.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# What is too long for `make test`. Each writes its records and docs/reliability.md; `make reliability` is all of it.
fuzz sanitize mutate: build
	$(BIN)/python -m tools.reliability run $@

reliability: build $(VENV)/.interop $(VENV)/.docs build/torch_headers/.complete
	$(REQUIRED) $(BIN)/python -m tools.reliability run

$(VENV)/.environment: requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements/dev.txt
	touch $@

# Published implementations that the tests convert; --no-deps keeps the pinned torch and numpy.
$(VENV)/.interop: requirements/interop.txt | $(VENV)/.environment
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/interop.txt
	touch $@

$(VENV)/.docs: requirements/docs.txt | $(VENV)/.environment
	$(BIN)/python -m pip install --quiet -r requirements/docs.txt
	touch $@

build/torch_headers/.complete: requirements/headers.txt tools/torch_headers.py | $(VENV)/.environment
	$(BIN)/python -m tools.torch_headers
	touch $@

environment: $(VENV)/.environment

# In place and incremental; a .pth file makes the checkout importable from anywhere, as an editable install would.
build: $(VENV)/.environment
	if command -v nvcc > /dev/null; then export TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$(TEST_CUDA_ARCHITECTURES)}"; fi; \
	$(BIN)/python setup.py build_ext --inplace > $(VENV)/build.log 2>&1 || { tail -n 60 $(VENV)/build.log; exit 1; }
	grep "^segattn_ops: " $(VENV)/build.log
	echo "$(CURDIR)" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/segattn_ops.pth"
	$(BIN)/python -m segattn_ops

# Wheels to give away, into dist/: docs/deployment.md.
$(VENV)/.wheels: requirements/wheels.txt | $(VENV)/.environment
	$(BIN)/python -m pip install --quiet -r requirements/wheels.txt
	touch $@

wheels: $(VENV)/.wheels
	$(BIN)/python -m tools.wheels

# The tools of .pre-commit-config.yaml, and mypy; `make format` applies what they would change.
CXX_FILES = find csrc tests/emulator -regex '.*\.\(h\|cuh\|cpp\|cu\)' -print0

lint: $(VENV)/.environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(CXX_FILES) | xargs -0 $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

format: $(VENV)/.environment
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CXX_FILES) | xargs -0 $(BIN)/clang-format -i

clean:
	rm -rf build dist *.egg-info report .mypy_cache segattn_ops/*.so segattn_ops/_build_info.json
