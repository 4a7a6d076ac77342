# The two commands: `make bench` and `make test`. `make help` lists the rest.
# Everything happens in .venv; a step runs again only when what it depends on has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPU_SOURCES := CMakeLists.txt $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h kernels/cpu/*.hpp)
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo bench figures test test-all gpu gpu-test gpu-rehearsal sanitize emulate lint format docs clean

help:
	@echo "make bench     set up .venv and run the benchmark: python benchmarks/run.py --seq 512 (more: ARGS=...)"
	@echo "make figures   measure everything that docs/performance.md says of this machine, and write it there"
	@echo "make demo      set up .venv; from the Python language reference to a small BERT that fills masks (build/demo)"
	@echo "make test      set up .venv and run the tests (the fast tier)"
	@echo "make test-all  the slow tier too"
	@echo "make gpu       what a GPU proves, a list of cases (ARGS=--list), with the Python that has torch with CUDA"
	@echo "make gpu-test  the same operator and model tests on a GPU, with the Python that has torch with CUDA (ARGS='-n 8')"
	@echo "make gpu-rehearsal  all of make gpu's host code without a GPU, in front of a stand-in for its driver: no numbers"
	@echo "make sanitize  the C++ operators' tests under AddressSanitizer, UBSan and ThreadSanitizer"
	@echo "make emulate   the C++ operators' tests with their AVX-512 code run by AVX2 instructions"
	@echo "make lint      check style (ruff) and types (mypy); make format rewrites the style"
	@echo "make docs      build the documentation's site, build/site/index.html; a warning is an error"
	@echo "make clean     remove .venv and what was built"

setup: $(VENV)/.installed

$(VENV)/.python:
	@sh scripts/check_prerequisites.sh $(PYTHON)
	@echo "== Making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.requirements: requirements.txt $(VENV)/.python
	@echo "== Installing the pinned requirements (requirements.txt)"
	@$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.requirements setup.py pyproject.toml $(CPU_SOURCES)
	@echo "== Building the C++ operators and installing bert_fast into $(VENV)"
	@$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	@sh scripts/demo.sh $(CURDIR)/$(BIN) build/demo

bench: setup
	@echo "== python benchmarks/run.py --seq 512 $(ARGS)"
	@$(BIN)/python benchmarks/run.py --seq 512 $(ARGS)

# Every figure of this machine in docs/performance.md, by the product's own step; takes most of an hour on two cores.
figures: setup
	@$(BIN)/python benchmarks/run.py --seq 512 --save $(ARGS)
	@$(BIN)/python benchmarks/run.py --seq 128 --save $(ARGS)
	@$(BIN)/python benchmarks/run.py --seq 512 --mode encode --batch 4 --rounds 5 --save $(ARGS)
	@$(BIN)/python benchmarks/run.py --mode finetune --rounds 3 --save
	@$(BIN)/python benchmarks/contrastive.py --batch 16 --rounds 3 --save
	@$(BIN)/python benchmarks/contrastive.py --batch 16 --cached 8 --rounds 3 --save
	@$(BIN)/python benchmarks/run.py --kernels --save $(ARGS)
	@$(BIN)/python benchmarks/report.py

test: setup
	@echo "== Tests, fast tier"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --durations=15 -m "not slow and not proof and not gpu" tests

test-all: setup
	@echo "== Tests, both tiers"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --durations=25 -m "not gpu and not proof" tests
	@echo "== The proof that it learns (about 25 minutes on 2 cores, 15 of them pre-training)"
	@$(BIN)/python -m pytest -s -m proof tests

# On a GPU machine the Python that has torch with CUDA is used as it is: PYTHON=... chooses it. Hundreds of kernels are
# compiled: ARGS='-n 8' does so in 8 processes, where pytest-xdist is installed.
gpu-test:
	@$(PYTHON) -c "import torch, sys; sys.exit(None if torch.cuda.is_available() else 'make gpu-test needs a GPU that torch sees; none is visible')"
	@$(PYTHON) -m pytest -m "not slow" --continue-on-collection-errors $(ARGS) $$($(PYTHON) -m benchmarks.device_tests)

# Neither .venv nor a network nor the C++ operators: ARGS='--budget 560 --case headline --out DIR'; ARGS=--list prints the cases.
gpu:
	@PYTHONUNBUFFERED=1 $(PYTHON) benchmarks/gpu.py $(ARGS)

# The same in front of a stand-in for a GPU's driver (dev/cuda_stand_in/README.md), with a Python that has torch's
# build for CUDA. Nothing of it is a measurement: results, caches and all stay in STAND_IN, whatever ARGS says.
STAND_IN := $(CURDIR)/build/cuda_stand_in
gpu-rehearsal:
	@mkdir -p $(STAND_IN)
	@headers=$$($(PYTHON) dev/cuda_stand_in/headers.py) && $(CC) -O1 -g -Wall -fPIC -shared \
		-Wl,-soname,libcuda.so.1 -Wl,-z,lazy $$headers dev/cuda_stand_in/stand_in.c -o $(STAND_IN)/libcuda.so.1
	@LD_PRELOAD=$(STAND_IN)/libcuda.so.1 LD_LIBRARY_PATH=$(STAND_IN)$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH} \
		PYTHONPATH=$(CURDIR)/dev/cuda_stand_in$${PYTHONPATH:+:$$PYTHONPATH} CUDA_STAND_IN_LOG=$(STAND_IN)/log \
		TRITON_CACHE_DIR=$(STAND_IN)/triton TORCHINDUCTOR_CACHE_DIR=$(STAND_IN)/inductor \
		PYTEST_PLUGINS=tests_without_values PYTHONUNBUFFERED=1 $(PYTHON) benchmarks/gpu.py $(ARGS) --out $(STAND_IN)/results

# The C++ operators' tests under AddressSanitizer and UBSan, then all of them on threads under ThreadSanitizer. What the
# library links is tested on the ordinary build: a sanitizer brings a C++ runtime.
SANITIZED_TESTS := tests/ops/test_cpu_backend.py tests/ops/test_attention.py tests/ops/test_mlm_loss.py tests/ops/test_bias_gelu.py \
	tests/ops/test_residual_layernorm.py tests/ops/test_embedding_layernorm.py tests/optim/test_optim.py tests/ops/test_cpu_attention.py
sanitize: setup
	@echo "== Building the C++ operators with AddressSanitizer and UBSan"
	@$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
		-DBERT_FAST_SANITIZE=address,undefined > build/sanitize.log && $(BIN)/cmake --build build/sanitize
	@echo "== Their tests"
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 OMP_NUM_THREADS=2 \
		BERT_FAST_CPU_LIBRARY=build/sanitize/libbert_fast_cpu.so \
		$(BIN)/python -m pytest -q -p no:cacheprovider -m "not slow and not gpu" $(SANITIZED_TESTS) \
		-k "(cpu or avx2 or scalar) and not opcheck and not compile and not needs_nothing_but_c"
	@echo "== Building them with ThreadSanitizer"
	@$(BIN)/cmake -S . -B build/threads -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DBERT_FAST_SANITIZE=thread \
		> build/threads.log && $(BIN)/cmake --build build/threads
	@TSAN_OPTIONS=halt_on_error=1 build/threads/bert_fast_threads

# The code of the AVX-512 sets, each forced, on any processor with AVX2 (tests/emulate/avx512.h).
emulate: setup
	@echo "== Building the C++ operators with AVX-512 emulated"
	@$(BIN)/cmake -S . -B build/emulate -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_BUILD_TYPE=Release \
		-DBERT_FAST_EMULATE_AVX512=ON > build/emulate.log && $(BIN)/cmake --build build/emulate
	@for set in avx512 avx512_bf16; do \
		echo "== Their tests with $$set"; \
		export BERT_FAST_CPU_LIBRARY=build/emulate/libbert_fast_cpu.so BERT_FAST_CPU_ISA=$$set OMP_NUM_THREADS=1; \
		$(BIN)/python -m pytest -q -p no:cacheprovider -m "not slow and not gpu" $(SANITIZED_TESTS) \
		-k "(cpu or instruction_set) and not opcheck and not compile" && \
		$(BIN)/python -m pytest -q -p no:cacheprovider tests/ops/test_attention.py -k "cpu and test_large" || exit 1; \
	done

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# The variable silences an advertisement of the theme's successor.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "build/site/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/cpu/*.so
