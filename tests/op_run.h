// Runs the cases of op_cases.h on either device, and compares. Shared by the tests of both.
#pragma once

#include <gtest/gtest.h>

#include "tests/cases/op_case.h"

/// The inputs of a case, and what its outputs hold before: random, the same every time.
Values random_values(const OpCase& op_case);

/// Host values into a tensor of any dtype, and back.
void put(Context& ctx, const Tensor& tensor, const std::vector<double>& values);
std::vector<double> get(Context& ctx, const Tensor& tensor);

/// Runs the case once where ctx says and returns all its floating-point tensors afterwards. Operands that are
/// marked `half` are stored as ctx.dtype.
Values run(Context& ctx, const OpCase& op_case, const Values& values);

inline double rms(const std::vector<double>& x) {
  return std::sqrt(sum_of_products(x, x) / static_cast<double>(std::max<size_t>(1, x.size())));
}

/// Written so that a NaN fails.
void expect_close(const std::string& what, double got, double want, double limit);

/// |got - want| <= tolerance (|want| + rms(want)) for every element of every output.
void expect_outputs(const OpCase& op_case, const Values& got, const Values& want, double tolerance,
                    const std::string& circumstances);

/// A test named after a case. GoogleTest's own parameterised tests cannot have such names.
class CaseTest : public testing::Test {
 public:
  CaseTest(OpCase op_case, void (*check)(const OpCase&)) : case_(std::move(op_case)), check_(check) {}
  void TestBody() override { check_(case_); }

 private:
  OpCase case_;
  void (*check_)(const OpCase&);
};

void register_case(const char* suite, const OpCase& op_case, void (*check)(const OpCase&));
