# Anthology. `make run` is the main job; `make help` lists the rest.
SHELL := /bin/bash
.DELETE_ON_ERROR:

CXX      ?= g++
BUILD    ?= build/cpu
OPT      ?= -O2 -march=native
WARN     := -Wall -Wextra -Werror
# No fast-math: a NaN must stay a NaN. These two only promise that nobody reads errno or traps after maths.
MATH     := -fno-math-errno -fno-trapping-math
CXXFLAGS := -std=c++20 $(OPT) $(MATH) -fopenmp -g1 $(WARN) -I. -DHAVE_GPU_KERNELS=0 $(EXTRA)
LDFLAGS  := -fopenmp $(EXTRA)
LDLIBS   := -ldnnl -llapack -lblas -lfmt

LIB_SOURCES  ?= $(filter-out train_gpt.cpp,$(wildcard *.cpp model/*.cpp model/kernels/*.cpp optim/*.cpp data/*.cpp))
TEST_SOURCES ?= $(wildcard tests/*.cpp)
objects = $(patsubst %.cpp,$(BUILD)/%.o,$(1))

all: train_gpt

train_gpt: $(BUILD)/train_gpt
	@ln -sf $< $@

$(BUILD)/train_gpt: $(BUILD)/train_gpt.o $(call objects,$(LIB_SOURCES))
	$(CXX) $(LDFLAGS) $^ $(LDLIBS) -o $@

$(BUILD)/tests/all: $(call objects,$(TEST_SOURCES)) $(call objects,$(LIB_SOURCES))
	$(CXX) $(LDFLAGS) $^ $(LDLIBS) -lgtest -lgtest_main -lpthread -o $@

# The arithmetic is worth the compiler's time; the rest is not.
$(BUILD)/model/kernels/%.o $(BUILD)/optim/%.o: OPT := $(subst -O2,-O3,$(OPT))

$(BUILD)/%.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -MMD -MP -c $< -o $@

$(BUILD)/train_gpt.o: train_gpt.cu
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -MMD -MP -x c++ -c $< -o $@

-include $(shell [ -d $(BUILD) ] && find $(BUILD) -name '*.d')
