# Anthology. `make run` is the main job; `make help` lists the rest.
SHELL := /bin/bash
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
JOBS := $(shell nproc 2>/dev/null || echo 2)

# ---------------------------------------------------------------------------------------------------- the compiler
CXX      ?= g++
NVCC     ?= nvcc
# What runs the CUDA halves: cpu (none are built), cuda (a GPU: where there are nvcc and a GPU, or with CUDA=1), or sim, the
# executor of dev/cuda_on_cpu, for tests.
ifeq ($(origin CUDA),undefined)
CUDA     := $(shell command -v $(NVCC) >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU && echo 1)
endif
DEVICE   ?= $(if $(filter 1,$(CUDA)),cuda,cpu)
BUILD    ?= build/$(DEVICE)
OPT      ?= -O2 -march=native
TEST_OPT ?= -O1
WARN     := -Wall -Wextra -Werror
# No fast-math: a NaN must stay a NaN. These two only promise that nobody reads errno or traps after maths.
MATH     := -fno-math-errno -fno-trapping-math
CXXFLAGS  = -std=c++20 $(OPT) $(MATH) -fopenmp -g1 $(WARN) -I. -DHAVE_GPU_KERNELS=$(if $(filter cpu,$(DEVICE)),0,1) $(EXTRA)
LDFLAGS   = -fopenmp $(EXTRA)
LDLIBS   := -ldnnl -llapack -lblas -lfmt

LIB_SOURCES  ?= $(wildcard *.cpp model/*.cpp model/kernels/*.cpp optim/*.cpp data/*.cpp)
TEST_SOURCES ?= $(filter-out $(if $(filter cpu,$(DEVICE)),tests/test_gpu_%),$(wildcard tests/test_*.cpp))
CUDA_SOURCES := $(wildcard model/kernels/*.cu optim/*.cu)
objects = $(patsubst %,$(BUILD)/%.o,$(basename $(filter-out %.cu,$(1)))) $(patsubst %.cu,$(BUILD)/%.cu.o,$(filter %.cu,$(1)))

# The CUDA halves: compiled by nvcc for sm_80 and newer, or by g++ for the executor.
CUDA_ARCH  ?= -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
NVCC_FLAGS  = -std=c++20 -O3 $(CUDA_ARCH) -lineinfo -I. -DHAVE_GPU_KERNELS=1 -ccbin $(CXX) -Xcompiler -Wall,-Wextra -Werror all-warnings
ifeq ($(DEVICE),sim)
LIB_SOURCES  += $(filter-out model/kernels/%_cublaslt.cu,$(CUDA_SOURCES)) $(wildcard dev/cuda_on_cpu/*.cpp)
TEST_SOURCES += $(wildcard tests/test_*.cu dev/lab/*.cu)
CXXFLAGS += -DCUDA_ON_CPU -Wno-unknown-pragmas
else ifeq ($(DEVICE),cuda)
LIB_SOURCES  += $(CUDA_SOURCES)
TEST_SOURCES += $(wildcard tests/test_*.cu dev/lab/*.cu)
CUDA_HOME ?= $(abspath $(dir $(shell command -v $(NVCC)))..)
LDLIBS   += -L$(CUDA_HOME)/lib64 -lcudart -lcublasLt
endif

# ------------------------------------------------------------------------------------------------------- packages
RUN_PACKAGES   := g++ libdnnl-dev liblapack-dev libcli11-dev libfmt-dev nlohmann-json3-dev gnuplot-nox bible-kjv
TEST_PACKAGES  := libgtest-dev
BENCH_PACKAGES := libbenchmark-dev
CHECK_PACKAGES := clang-format clang-tidy $(BENCH_PACKAGES)

# --------------------------------------------------------------------------------------------------------- targets
.PHONY: all run test check bench deps format lint help clean gpu-check anthology detect
all: detect train_gpt

help:
	@echo 'make            build train_gpt, for GPUs too where there are nvcc and a GPU, or with CUDA=1'
	@echo 'make run        everything: install, build, get the text, train, plot, sample (4 minutes on 2 cores)'
	@echo 'make test       install what the tests need, build and run them (minutes)'
	@echo 'make check      the slow checks: sanitizers, fuzzing, kill -9, format, lint'
	@echo 'make anthology  every experiment on norms and rules, with tables and pictures (an hour on 2 cores)'
	@echo 'make bench      time per phase, rule and operation against the floor of this machine'
	@echo 'make gpu-check  everything that only a GPU can show: builds, tests, sanitizers, floors, PyTorch; writes a report'
	@echo 'make deps       install everything that any target needs'
	@echo 'make format     clang-format, in place;  make lint: clang-tidy'

detect:
	@if [ $(DEVICE) = cpu ] && command -v $(NVCC) >/dev/null 2>&1; then \
	  echo 'nvcc found but no GPU: building the CPU program; make CUDA=1 builds the one for GPUs'; fi

run:
	@dev/install.sh $(RUN_PACKAGES)
	@$(MAKE) -j$(JOBS) train_gpt
	@dev/run.sh

# The tests run both halves of every operation, the CUDA half in the executor, and the program with both; make check runs the
# program without CUDA the same way.
test:
	@dev/install.sh $(RUN_PACKAGES) $(TEST_PACKAGES)
	@$(MAKE) -j$(JOBS) DEVICE=sim build/sim/train_gpt build/sim/tests/all
	@tests/run.sh build/sim/train_gpt build/sim

check:
	@dev/install.sh $(RUN_PACKAGES) $(TEST_PACKAGES) $(CHECK_PACKAGES)
	@$(MAKE) -j$(JOBS) CUDA=0 train_gpt
	@$(MAKE) -j$(JOBS) DEVICE=sim build/sim/train_gpt build/sim/tests/all build/sim/harness
	@tests/check.sh

bench:
	@dev/install.sh $(RUN_PACKAGES) $(BENCH_PACKAGES)
	@$(MAKE) -j$(JOBS) $(BUILD)/dev/bench $(BUILD)/dev/bench_rules $(BUILD)/harness
	@$(BUILD)/dev/bench $(BENCH)
	@$(if $(BENCH),,$(BUILD)/dev/bench_rules && $(BUILD)/harness)

# Small models on the CPU, whatever the machine has; ANTHOLOGY=--quick makes everything tiny.
anthology:
	@dev/install.sh $(RUN_PACKAGES) python3
	@$(MAKE) -j$(JOBS) CUDA=0 train_gpt
	@python3 dev/anthology/anthology.py $(ANTHOLOGY)

gpu-check:
	@dev/gpu_check.sh $(GPU_CHECK)

deps:
	@dev/install.sh $(RUN_PACKAGES) $(TEST_PACKAGES) $(CHECK_PACKAGES)
	@tests/test_transformers.sh --install

clean:
	rm -rf build train_gpt

SOURCES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
format:
	clang-format -i $(SOURCES)

# clang-tidy 14 cannot read std::source_location, which the executor is made of.
lint:
	@clang-format --dry-run -Werror $(SOURCES)
	@tests/rooms.sh
	@printf '%s\n' $(filter-out dev/cuda_on_cpu/%,$(filter %.cpp,$(SOURCES))) | xargs -P$(JOBS) -n1 sh -c \
	  'clang-tidy --quiet --warnings-as-errors="*" "$$0" -- -std=c++20 -fopenmp -I. -DHAVE_GPU_KERNELS=0 2>/dev/null'

# ----------------------------------------------------------------------------------------------------------- files
train_gpt: $(BUILD)/train_gpt
	@ln -sf $< $@

$(BUILD)/train_gpt: $(BUILD)/train_gpt.o $(call objects,$(LIB_SOURCES))
	$(CXX) $(LDFLAGS) $^ $(LDLIBS) -o $@

$(BUILD)/tests/all: $(call objects,$(TEST_SOURCES)) $(call objects,$(LIB_SOURCES))
	$(CXX) $(LDFLAGS) $^ $(LDLIBS) -lgtest -lgtest_main -lpthread -o $@

$(BUILD)/tests/fuzz_files: $(BUILD)/tests/fuzz_files.o $(call objects,$(LIB_SOURCES))
	$(CXX) $(LDFLAGS) $^ $(LDLIBS) -o $@

$(BUILD)/dev/bench $(BUILD)/dev/bench_rules: %: %.o $(call objects,$(LIB_SOURCES))
	$(CXX) $(LDFLAGS) $^ $(LDLIBS) -o $@

HARNESS_SOURCES := $(wildcard dev/harness/*.cpp) $(if $(filter cpu,$(DEVICE)),,$(wildcard dev/harness/*.cu dev/lab/*.cu))
$(BUILD)/harness: $(call objects,$(HARNESS_SOURCES)) $(call objects,$(LIB_SOURCES))
	$(CXX) $(LDFLAGS) $^ $(LDLIBS) -lbenchmark -lpthread -o $@

# The arithmetic is worth the compiler's time; the rest is not.
$(BUILD)/model/kernels/%.o $(BUILD)/optim/%.o: private OPT := $(subst -O2,-O3,$(OPT))
$(BUILD)/tests/%.o: private OPT := $(filter-out -O%,$(OPT)) $(TEST_OPT)

# What most files include, parsed once: a fifth of the compiler's time. Every file includes what it uses all the same; lint,
# which reads them without this, would see it.
$(BUILD)/precompiled.h.gch $(BUILD)/precompiled_tests.h.gch: $(BUILD)/%.h.gch: dev/%.h dev/precompiled.h
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -x c++-header $< -o $@

compile = $(CXX) $(CXXFLAGS) -include $(BUILD)/$(1) -MMD -MP -c $< -o $@

$(BUILD)/%.o: %.cpp | $(BUILD)/precompiled.h.gch
	@mkdir -p $(@D)
	$(call compile,precompiled.h)

$(BUILD)/tests/%.o: tests/%.cpp | $(BUILD)/precompiled_tests.h.gch
	@mkdir -p $(@D)
	$(call compile,precompiled_tests.h)

$(BUILD)/%.cu.o: %.cu
	@mkdir -p $(@D)
ifeq ($(DEVICE),cuda)
	@# What ptxas says of every kernel is kept beside the object, for tests/check_ptxas.sh.
	$(NVCC) $(NVCC_FLAGS) -Xptxas -v -MMD -MP -c $< -o $@ 2>$@.ptxas || { cat $@.ptxas >&2; exit 1; }
else
	$(CXX) $(CXXFLAGS) -fno-strict-aliasing -Wno-strict-aliasing -MMD -MP -x c++ -c $< -o $@
endif

$(BUILD)/train_gpt.o: train_gpt.cu | $(BUILD)/precompiled.h.gch
	@mkdir -p $(@D)
	$(call compile,precompiled.h -x c++)

# The revision goes into the log of a run; the stamp changes when it does.
REVISION := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
$(BUILD)/revision: FORCE
	@mkdir -p $(@D)
	@[ "$$(cat $@ 2>/dev/null)" = '$(REVISION)' ] || echo '$(REVISION)' >$@
$(BUILD)/commands.o: EXTRA += -DGIT_REVISION='"$(REVISION)"'
$(BUILD)/commands.o: $(BUILD)/revision
FORCE:

-include $(shell [ -d $(BUILD) ] && find $(BUILD) -name '*.d')
