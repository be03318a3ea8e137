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
TEST_OPT ?= -O0
WARN     := -Wall -Wextra -Werror
# No fast-math: a NaN must stay a NaN. These two only promise that nobody reads errno or traps after maths.
MATH     := -fno-math-errno -fno-trapping-math
CXXFLAGS  = -std=c++20 $(OPT) $(MATH) -fopenmp -g1 $(WARN) -I. -DHAVE_GPU_KERNELS=$(if $(filter cpu,$(DEVICE)),0,1) $(OWN_FLAGS) $(EXTRA)
LDFLAGS   = -fopenmp $(EXTRA)
LDLIBS   := -ldnnl -llapack -lblas -lfmt -ldl

# How processes talk to each other: over MPI where there is mpicxx (MPI=0: not), over NCCL where nvcc has nccl.h (NCCL=0: not).
ifeq ($(origin MPI),undefined)
MPI      := $(shell command -v mpicxx >/dev/null && mpicxx -show >/dev/null 2>&1 && echo 1)
endif
CUDA_HOME ?= $(abspath $(dir $(shell command -v $(NVCC)))..)
NCCL     ?= $(if $(wildcard $(CUDA_HOME)/include/nccl.h),1)
HAVE_MPI  := $(if $(filter 1,$(MPI)),1,0)
# The executor has an NCCL of its own.
HAVE_NCCL := $(if $(filter sim,$(DEVICE)),1,$(if $(filter cuda,$(DEVICE)),$(if $(filter 1,$(NCCL)),1,0),0))
ifeq ($(HAVE_MPI),1)
MPI_WORDS := $(shell mpicxx -show)
MPI_FLAGS := -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX $(patsubst -I%,-isystem %,$(filter -I%,$(MPI_WORDS)))
LDLIBS    += $(filter-out -lmpi_cxx -lmpicxx,$(filter -L% -l% -Wl%,$(MPI_WORDS)))
endif
NCCL_FOUND   := $(if $(filter cuda,$(DEVICE)),$(if $(filter 1,$(HAVE_NCCL)),and NCCL,and without NCCL (no nccl.h beside nvcc)))
MPI_SOURCES  := model/kernels/comm_mpi.cpp $(wildcard model/kernels/mpi_*.cpp)
NCCL_SOURCES := $(wildcard model/kernels/*_nccl.cu)
ABSENT       := $(if $(filter 0,$(HAVE_MPI)),$(MPI_SOURCES)) $(if $(filter 0,$(HAVE_NCCL)),$(NCCL_SOURCES))

LIB_SOURCES  ?= $(wildcard *.cpp world/*.cpp model/*.cpp model/kernels/*.cpp optim/*.cpp data/*.cpp)
TEST_SOURCES ?= $(filter-out $(if $(filter cpu,$(DEVICE)),tests/test_gpu_%),$(wildcard tests/test_*.cpp))
# Where the objects of tests/*.cpp lie: a build with sanitizers may take those of another one, without them.
TESTS_FROM   ?= $(BUILD)
# What several tests share, and the table of cases with their oracles, which the harness times, too.
TEST_SHARED  ?= $(filter-out tests/test_% tests/fuzz_%,$(wildcard tests/*.cpp))
ORACLES      := $(addprefix tests/,op_cases.cpp op_run.cpp attention_oracle.cpp optim_golden.cpp)
CUDA_SOURCES := $(wildcard model/kernels/*.cu optim/*.cu)
present = $(filter-out $(ABSENT),$(1))
objects = $(patsubst %,$(BUILD)/%.o,$(basename $(filter-out %.cu,$(present)))) $(patsubst %.cu,$(BUILD)/%.cu.o,$(filter %.cu,$(present)))

# The CUDA halves: compiled by nvcc for sm_80 and newer, or by g++ for the executor.
CUDA_ARCH  ?= -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
NVCC_FLAGS  = -std=c++20 -O3 $(CUDA_ARCH) -lineinfo -I. -DHAVE_GPU_KERNELS=1 -ccbin $(CXX) -Xcompiler -Wall,-Wextra -Werror all-warnings
ifeq ($(DEVICE),sim)
LIB_SOURCES  += $(filter-out model/kernels/%_cublaslt.cu,$(CUDA_SOURCES)) $(wildcard dev/cuda_on_cpu/*.cpp)
TEST_SOURCES += $(wildcard tests/test_*.cu dev/lab/*.cu)
CXXFLAGS += -DCUDA_ON_CPU -Wno-unknown-pragmas
# A build for tests: g++ may take 650 MB before it collects garbage, which saves a tenth of its time.
CXXFLAGS += --param ggc-min-heapsize=2000000 --param ggc-min-expand=400
else ifeq ($(DEVICE),cuda)
LIB_SOURCES  += $(CUDA_SOURCES)
TEST_SOURCES += $(wildcard tests/test_*.cu dev/lab/*.cu)
# The program opens cuBLASLt and NCCL when it needs them (shared_library.h); until then it needs nothing of CUDA.
LDLIBS   += -L$(CUDA_HOME)/lib64 -Wl,-rpath,$(CUDA_HOME)/lib64 -lcudart_static -lrt
endif

# ------------------------------------------------------------------------------------------------------- packages
RUN_PACKAGES   := g++ libdnnl-dev liblapack-dev libopenblas0-openmp libcli11-dev libfmt-dev nlohmann-json3-dev gnuplot-nox bible-kjv
TEST_PACKAGES  := libgtest-dev libopenmpi-dev openmpi-bin
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
	@echo 'make bench      time per phase, rule and operation against the floor of this machine; two ranks of it'
	@echo 'make gpu-check  everything that only a GPU can show: builds, tests, sanitizers, floors, PyTorch; writes a report'
	@echo 'make deps       install everything that any target needs'
	@echo 'make format     clang-format, in place;  make lint: clang-tidy'
	@echo
	@echo 'Many processes (mpirun -np 2 ./train_gpt train ...): over MPI where there is mpicxx, which one process does not need'
	@echo '(make test and make deps install libopenmpi-dev and openmpi-bin), over NCCL with CUDA where nccl.h is beside nvcc.'
	@echo 'MPI=0 and NCCL=0 leave them out.'

detect:
	@echo '$(DEVICE) program; many processes: $(if $(filter 1,$(HAVE_MPI)),with MPI,without MPI (no mpicxx)) $(NCCL_FOUND)'
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
	@$(MAKE) -j$(JOBS) $(BUILD)/train_gpt $(BUILD)/dev/bench $(BUILD)/dev/bench_rules $(BUILD)/dev/bench_ranks $(BUILD)/harness
	@$(BUILD)/dev/bench $(BENCH)
	@$(if $(BENCH),,$(BUILD)/dev/bench_rules && $(BUILD)/harness && $(BUILD)/dev/bench_ranks && python3 dev/bench_ranks.py $(BUILD)/train_gpt)

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

# clang-tidy 14 cannot read std::source_location, which the executor is made of. LINT=program leaves out the tests, for
# make check, which has little time.
LINTED = $(filter-out dev/cuda_on_cpu/% $(if $(filter program,$(LINT)),tests/%),$(filter %.cpp,$(SOURCES)))
lint:
	@clang-format --dry-run -Werror $(SOURCES)
	@tests/rooms.sh
	@tests/lint.py $(LINTED) -- -std=c++20 -fopenmp -I. $(MPI_FLAGS) \
	  -DHAVE_GPU_KERNELS=0 -DHAVE_MPI=$(HAVE_MPI) -DHAVE_NCCL=0

# ----------------------------------------------------------------------------------------------------------- files
train_gpt: $(BUILD)/train_gpt
	@ln -sf $< $@

$(BUILD)/train_gpt: $(BUILD)/train_gpt.o $(call objects,$(LIB_SOURCES))
	$(CXX) $(LDFLAGS) $^ $(LDLIBS) -o $@

# The program comes first: of an inline function that several have, the linker takes the program's, with its sanitizers, then
# that of the oracles, which are optimised.
$(BUILD)/tests/all: $(call objects,$(LIB_SOURCES)) $(patsubst $(BUILD)/%,$(TESTS_FROM)/%,$(call objects,$(filter $(ORACLES),$(TEST_SHARED)))) \
    $(call objects,$(filter %.cu,$(TEST_SOURCES))) \
    $(patsubst $(BUILD)/%,$(TESTS_FROM)/%,$(call objects,$(filter %.cpp,$(TEST_SOURCES) $(TEST_SHARED))))
	$(CXX) $(LDFLAGS) $^ $(LDLIBS) -lgtest -lgtest_main -lpthread -o $@

$(BUILD)/tests/fuzz_files: $(BUILD)/tests/fuzz_files.o $(call objects,$(LIB_SOURCES))
	$(CXX) $(LDFLAGS) $^ $(LDLIBS) -o $@

$(BUILD)/tests/cuda_libraries: $(call objects,tests/cuda_libraries.cu model/kernels/shared_library.cpp)
	$(CXX) $(LDFLAGS) $^ $(LDLIBS) -o $@

$(BUILD)/dev/bench $(BUILD)/dev/bench_rules $(BUILD)/dev/bench_ranks: %: %.o $(call objects,$(LIB_SOURCES))
	$(CXX) $(LDFLAGS) $^ $(LDLIBS) -o $@

HARNESS_SOURCES := tests/op_cases.cpp tests/attention_oracle.cpp $(wildcard dev/harness/*.cpp) $(if $(filter cpu,$(DEVICE)),,$(wildcard dev/harness/*.cu dev/lab/*.cu))
$(BUILD)/harness: $(call objects,$(HARNESS_SOURCES)) $(call objects,$(LIB_SOURCES))
	$(CXX) $(LDFLAGS) $^ $(LDLIBS) -lbenchmark -lpthread -o $@

# The arithmetic is worth the compiler's time, and the oracles are loops, too; the rest is not.
$(BUILD)/model/kernels/%.o $(BUILD)/optim/%.o: private OPT := $(subst -O2,-O3,$(OPT))
$(BUILD)/tests/%.o $(BUILD)/precompiled_tests%.gch: private OPT := $(filter-out -O%,$(OPT)) $(TEST_OPT)
$(call objects,$(ORACLES)): private OPT := $(OPT)

# What most files include, parsed once. Two of each: nlohmann/json makes the compiler instantiate its parser in every file,
# used or not (0.4 s), so only those that include it get it; a file that is not found here parses it by itself. Every file
# includes what it uses all the same; lint, which reads them without this, would see it.
includers = $(shell grep -lE '^\#include [<"]($(subst $(SPACE),|,$(strip $(1))))[>"]' *.h *.cpp *.cu */*.h */*.cpp */*.cu */*/*.h */*/*.cpp)
SPACE    := $(subst ,, )
JSON     := $(call includers,nlohmann/json.hpp)
JSON     += $(call includers,$(filter %.h,$(JSON)))
$(call objects,$(filter %.cpp,$(JSON))) $(BUILD)/train_gpt.o: private WITH := _json
PRECOMPILED       := $(BUILD)/precompiled.h.gch $(BUILD)/precompiled_json.h.gch
PRECOMPILED_TESTS := $(BUILD)/precompiled_tests.h.gch $(BUILD)/precompiled_tests_json.h.gch
$(PRECOMPILED) $(PRECOMPILED_TESTS): $(BUILD)/%.h.gch: dev/%.h $(wildcard dev/precompiled*.h)
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -x c++-header $< -o $@

compile = $(CXX) $(CXXFLAGS) -include $(BUILD)/$(1)$(WITH).h -MMD -MP $(2) -c $< -o $@

$(BUILD)/%.o: %.cpp | $(PRECOMPILED)
	@mkdir -p $(@D)
	$(call compile,precompiled)

$(call objects,$(ORACLES)): $(BUILD)/%.o: %.cpp | $(PRECOMPILED)
	@mkdir -p $(@D)
	$(call compile,precompiled)

$(BUILD)/tests/%.o: tests/%.cpp | $(PRECOMPILED_TESTS)
	@mkdir -p $(@D)
	$(call compile,precompiled_tests)

$(BUILD)/%.cu.o: %.cu | $(if $(filter sim,$(DEVICE)),$(PRECOMPILED) $(PRECOMPILED_TESTS))
	@mkdir -p $(@D)
ifeq ($(DEVICE),cuda)
	@# What ptxas says of every kernel is kept beside the object, for tests/check_ptxas.sh.
	$(NVCC) $(NVCC_FLAGS) -Xptxas -v -MMD -MP -c $< -o $@ 2>$@.ptxas || { cat $@.ptxas >&2; exit 1; }
else
	$(call compile,$(if $(filter tests/%,$<),precompiled_tests,precompiled),-x c++ -fno-strict-aliasing -Wno-strict-aliasing)
endif

$(BUILD)/train_gpt.o: train_gpt.cu | $(PRECOMPILED)
	@mkdir -p $(@D)
	$(call compile,precompiled,-x c++)

# Which backends there are goes into the few files that ask; the stamp changes when that does.
BACKENDS := $(HAVE_MPI) $(HAVE_NCCL) $(MPI_FLAGS)
$(BUILD)/backends: FORCE
	@mkdir -p $(@D)
	@[ "$$(cat $@ 2>/dev/null)" = '$(BACKENDS)' ] || echo '$(BACKENDS)' >$@
ASK_BACKENDS := $(call objects,$(shell grep -ls '"model/kernels/backends.h"' *.cpp world/*.cpp model/kernels/*.cpp tests/*.cpp dev/harness/*.cpp))
$(ASK_BACKENDS): private OWN_FLAGS += -DHAVE_MPI=$(HAVE_MPI) -DHAVE_NCCL=$(HAVE_NCCL)
$(ASK_BACKENDS) $(call objects,$(MPI_SOURCES)): $(BUILD)/backends
$(call objects,$(MPI_SOURCES)): private OWN_FLAGS += $(MPI_FLAGS)

# The revision goes into the log of a run; the stamp changes when it does.
REVISION := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
$(BUILD)/revision: FORCE
	@mkdir -p $(@D)
	@[ "$$(cat $@ 2>/dev/null)" = '$(REVISION)' ] || echo '$(REVISION)' >$@
$(BUILD)/commands.o: private EXTRA += -DGIT_REVISION='"$(REVISION)"'
$(BUILD)/commands.o: $(BUILD)/revision
FORCE:

-include $(shell [ -d $(BUILD) ] && find $(BUILD) -name '*.d')
