// The one table of operation cases: which sizes of which operation are tested, and which are timed. Read by
// the tests of both devices (test_ops.cpp, test_gpu_ops.cpp) and by dev/harness. To cover a new operation,
// copy tests/cases/gelu.h: a function that makes a case of given sizes; and list sizes in op_cases.cpp.
#pragma once

#include "tests/cases/op_case.h"

/// Sizes for tests: one of everything, nothing a multiple of a vector, and some that every thread takes part
/// in.
std::vector<OpCase> test_cases();

/// Sizes of a training step; GPT-2 124M at 4 x 256 tokens unless told otherwise. The logits exist for `chunk`
/// rows at a time.
struct TrainingSizes {
  int64_t B = 4, T = 256, C = 768, NH = 12, V = 50257, chunk = 256;
};

/// Every operation of a training step of GPT-2, and the products of its Newton-Schulz.
std::vector<OpCase> training_cases(const TrainingSizes& sizes = {});
