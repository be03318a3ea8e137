# Anthology. `make run` is the main job; `make help` lists the rest.
SHELL := /bin/bash
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
JOBS := $(shell nproc 2>/dev/null || echo 2)

# ---------------------------------------------------------------------------------------------------- the compiler
CXX      ?= g++
BUILD    ?= build/cpu
OPT      ?= -O2 -march=native
WARN     := -Wall -Wextra -Werror
# No fast-math: a NaN must stay a NaN. These two only promise that nobody reads errno or traps after maths.
MATH     := -fno-math-errno -fno-trapping-math
CXXFLAGS  = -std=c++20 $(OPT) $(MATH) -fopenmp -g1 $(WARN) -I. -DHAVE_GPU_KERNELS=0 $(EXTRA)
LDFLAGS   = -fopenmp $(EXTRA)
LDLIBS   := -ldnnl -llapack -lfmt

# The CUDA halves of the operations do not exist yet, so the CPU program is what gets built, and we say so.
ifeq ($(CUDA),1)
$(error CUDA=1: this version has no CUDA kernels yet, build without it)
endif

LIB_SOURCES  ?= $(wildcard *.cpp model/*.cpp model/kernels/*.cpp optim/*.cpp data/*.cpp)
TEST_SOURCES ?= $(wildcard tests/test_*.cpp)
objects = $(patsubst %.cpp,$(BUILD)/%.o,$(1))

# ------------------------------------------------------------------------------------------------------- packages
RUN_PACKAGES   := g++ libdnnl-dev liblapack-dev libcli11-dev libfmt-dev nlohmann-json3-dev gnuplot-nox bible-kjv
TEST_PACKAGES  := libgtest-dev
CHECK_PACKAGES := clang-format clang-tidy

# --------------------------------------------------------------------------------------------------------- targets
.PHONY: all run test check bench deps format lint help clean gpu-check detect
all: detect train_gpt

help:
	@echo 'make            build train_gpt'
	@echo 'make run        everything: install, build, get the text, train, plot, sample (4 minutes on 2 cores)'
	@echo 'make test       install what the tests need, build and run them (minutes)'
	@echo 'make check      the slow checks: sanitizers, fuzzing, kill -9, format, lint'
	@echo 'make bench      time per phase and operation against the matrix-product floor of this machine'
	@echo 'make deps       install everything that any target needs'
	@echo 'make format     clang-format, in place;  make lint: clang-tidy'

detect:
	@if command -v nvcc >/dev/null 2>&1; then echo 'nvcc found, but this version has no CUDA kernels yet: building the CPU program'; fi

run:
	@dev/install.sh $(RUN_PACKAGES)
	@$(MAKE) -j$(JOBS) train_gpt
	@dev/run.sh

test:
	@dev/install.sh $(RUN_PACKAGES) $(TEST_PACKAGES)
	@$(MAKE) -j$(JOBS) train_gpt $(BUILD)/tests/all
	@tests/run.sh $(BUILD)

check:
	@dev/install.sh $(RUN_PACKAGES) $(TEST_PACKAGES) $(CHECK_PACKAGES)
	@$(MAKE) -j$(JOBS) train_gpt $(BUILD)/tests/all
	@tests/check.sh

bench:
	@dev/install.sh $(RUN_PACKAGES)
	@$(MAKE) -j$(JOBS) $(BUILD)/dev/bench $(BUILD)/dev/bench_ops
	@$(BUILD)/dev/bench $(BENCH)
	@$(if $(BENCH),,$(BUILD)/dev/bench_ops)

gpu-check:
	@echo 'make gpu-check: error: this version has no CUDA kernels yet' >&2; exit 1

deps:
	@dev/install.sh $(RUN_PACKAGES) $(TEST_PACKAGES) $(CHECK_PACKAGES)
	@tests/test_transformers.sh --install

clean:
	rm -rf build train_gpt

SOURCES = $(shell git ls-files '*.h' '*.cpp' '*.cu')
format:
	clang-format -i $(SOURCES)

lint:
	@clang-format --dry-run -Werror $(SOURCES)
	@tests/rooms.sh
	@printf '%s\n' $(filter %.cpp,$(SOURCES)) | xargs -P$(JOBS) -n1 sh -c \
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

$(BUILD)/dev/bench $(BUILD)/dev/bench_ops: %: %.o $(call objects,$(LIB_SOURCES))
	$(CXX) $(LDFLAGS) $^ $(LDLIBS) -o $@

# The arithmetic is worth the compiler's time; the rest is not.
$(BUILD)/model/kernels/%.o $(BUILD)/optim/%.o: OPT := $(subst -O2,-O3,$(OPT))

$(BUILD)/%.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -MMD -MP -c $< -o $@

$(BUILD)/train_gpt.o: train_gpt.cu
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -MMD -MP -x c++ -c $< -o $@

# The revision goes into the log of a run; the stamp changes when it does.
REVISION := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
$(BUILD)/revision: FORCE
	@mkdir -p $(@D)
	@[ "$$(cat $@ 2>/dev/null)" = '$(REVISION)' ] || echo '$(REVISION)' >$@
$(BUILD)/commands.o: EXTRA += -DGIT_REVISION='"$(REVISION)"'
$(BUILD)/commands.o: $(BUILD)/revision
FORCE:

-include $(shell [ -d $(BUILD) ] && find $(BUILD) -name '*.d')
