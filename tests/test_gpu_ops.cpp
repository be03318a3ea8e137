// Every CUDA half against the float64 oracle of its case (op_cases.h): in the executor, in three thread
// orders, or on a GPU. bf16 too: inputs are rounded first, so that the oracle sees what the kernel sees.
#include "tests/op_cases.h"
#include "tests/op_run.h"
#include "tests/thread_orders.h"

namespace {
/// What rounding an output to bf16 may do, on top of the case's tolerance: half a unit of 8 bits.
constexpr double kHalfRounding = 1.0 / 256;

void check(const OpCase& op_case, DType dtype) {
  Values before = random_values(op_case);
  if (dtype == DType::bf16)
    for (const Operand& operand : op_case.operands)
      if (operand.half)
        for (double& x : before[operand.name]) x = to_float(to_bf16(static_cast<float>(x)));
  Values want = before;
  op_case.oracle(want);
  Values first;
  for_each_thread_order([&](const std::string& order) {
    Context ctx;
    use_gpu(ctx, 0, dtype);
    const Values got = run(ctx, op_case, before);
    expect_outputs(op_case, got, want, op_case.tolerance + (dtype == DType::bf16 ? kHalfRounding : 0), order);
    if (first.empty()) first = got;
    EXPECT_EQ(got, first) << "not deterministic: " << order;
  });
}

[[maybe_unused]] const bool registered = [] {
  for (const OpCase& op_case : test_cases()) {
    register_case("GpuF32", op_case, [](const OpCase& c) { check(c, DType::f32); });
    if (std::ranges::any_of(op_case.operands, [](const Operand& o) { return o.half; }))
      register_case("GpuBf16", op_case, [](const OpCase& c) { check(c, DType::bf16); });
  }
  return true;
}();
}  // namespace
