#include "tests/op_run.h"

#include <gtest/gtest.h>

#include <random>

Values random_values(const OpCase& op_case) {
  Values values;
  std::mt19937_64 random(1234);
  for (const Operand& operand : op_case.operands) {
    std::vector<double>& out = values[operand.name];
    if (!operand.same_as.empty()) {
      out = values[operand.same_as];
      continue;
    }
    std::normal_distribution<double> normal(operand.offset, operand.scale);
    std::uniform_int_distribution<int64_t> below(0, std::max<int64_t>(1, operand.below) - 1);
    for (int64_t i = 0; i < operand.shape.size(); ++i)
      out.push_back(operand.below > 0             ? static_cast<double>(below(random))
                    : operand.dtype == DType::f64 ? normal(random)
                                                  : static_cast<float>(normal(random)));
  }
  if (op_case.prepare) op_case.prepare(values);
  return values;
}

void put(Context& ctx, const Tensor& tensor, const std::vector<double>& values) {
  OnHost host(ctx, tensor, /*load=*/false);
  for (int64_t i = 0; i < tensor.size(); ++i) {
    const double value = values[static_cast<size_t>(i)];
    if (tensor.dtype == DType::i32) host->i32()[i] = static_cast<int32_t>(value);
    if (tensor.dtype == DType::f32) host->f32()[i] = static_cast<float>(value);
    if (tensor.dtype == DType::f64) host->f64()[i] = value;
    if (tensor.dtype == DType::bf16) host->bf16()[i] = to_bf16(static_cast<float>(value));
  }
  host.store();
}

std::vector<double> get(Context& ctx, const Tensor& tensor) {
  const OnHost host(ctx, tensor);
  std::vector<double> values;
  for (int64_t i = 0; i < tensor.size(); ++i)
    values.push_back(tensor.dtype == DType::i32    ? host->i32()[i]
                     : tensor.dtype == DType::f64  ? host->f64()[i]
                     : tensor.dtype == DType::bf16 ? to_float(host->bf16()[i])
                                                   : host->f32()[i]);
  return values;
}

Values run(Context& ctx, const OpCase& op_case, const Values& values) {
  if (op_case.scratch_bytes) ctx.scratch.reserve(op_case.scratch_bytes(ctx));
  Tensors tensors;
  Arena arena("test");
  for (const Operand& operand : op_case.operands)
    if (operand.same_as.empty())
      arena.add(&tensors[operand.name],
                operand.below > 0 ? DType::i32
                : operand.half    ? ctx.dtype
                                  : operand.dtype,
                operand.shape);
  arena.allocate(ctx);
  for (const Operand& operand : op_case.operands) {
    if (!operand.same_as.empty())
      tensors[operand.name] = tensors.at(operand.same_as).view(operand.shape);
    else
      put(ctx, tensors[operand.name], values.at(operand.name));
  }
  op_case.run(ctx, tensors);
  Values after;
  for (const Operand& operand : op_case.operands)
    if (operand.below == 0) after[operand.name] = get(ctx, tensors.at(operand.name));
  return after;
}

void expect_close(const std::string& what, double got, double want, double limit) {
  EXPECT_TRUE(std::abs(got - want) <= limit)
      << what << ": got " << got << ", want " << want << " +- " << limit;
}

void expect_outputs(const OpCase& op_case, const Values& got, const Values& want, double tolerance,
                    const std::string& circumstances) {
  for (const Operand& operand : op_case.operands) {
    if (!operand.output) continue;
    const auto& g = got.at(operand.name);
    const auto& w = want.at(operand.name);
    const double typical = rms(w);
    for (size_t i = 0; i < w.size(); ++i) {
      const double limit = tolerance * (std::abs(w[i]) + typical);
      if (std::abs(g[i] - w[i]) <= limit)
        continue;  // a message for every element would cost more than the rest
      expect_close(operand.name + "[" + std::to_string(i) + "], " + circumstances, g[i], w[i], limit);
      return;
    }
  }
}

void register_case(const char* suite, const OpCase& op_case, void (*check)(const OpCase&)) {
  testing::RegisterTest(suite, op_case.name.c_str(), nullptr, nullptr, __FILE__, __LINE__,
                        [=]() -> testing::Test* { return new CaseTest(op_case, check); });
}
