#include "dev/harness/case_run.h"

#include <fmt/format.h>

#include <cmath>

#include "dev/harness/cases.h"
#include "model/kernels/simd.h"

namespace {
/// What the float64 loops may cost: a few seconds on one core.
constexpr double kMostOracleFlops = 5e8, kMostOracleElements = 1.5e8;
/// How far an output of bf16 operations may be from the reference as a whole: |got - want| / |want|.
constexpr double kMostHalfDistance = 1.0 / 128;

/// Element i of a stream of uniform numbers in [-1, 1): a mixed counter, so that any thread can make any
/// element.
double uniform(uint64_t stream, int64_t i) {
  uint64_t x = stream * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(i) * 0xd1342543de82ef95u;
  x = (x ^ x >> 32) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 29) * 0x94d049bb133111ebu;
  x ^= x >> 32;
  return static_cast<double>(x >> 11) * 0x1p-52 - 1;
}

void fill_tensor(const Context& ctx, const Tensor& tensor, const Operand& operand, uint64_t stream) {
  parallel_for(ctx, tensor.size(), 4096, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const double u = uniform(stream, i);
      if (operand.below > 0)
        tensor.i32()[i] = static_cast<int32_t>((u + 1) / 2 * static_cast<double>(operand.below));
      else
        tensor.f32()[i] = static_cast<float>(operand.offset + operand.scale * std::sqrt(3.0) * u);
    }
  });
}

Values values_of(const Tensors& tensors) {
  Values values;
  for (const auto& [name, tensor] : tensors)
    for (int64_t i = 0; i < tensor.size(); ++i)
      values[name].push_back(tensor.dtype == DType::i32 ? tensor.i32()[i] : tensor.f32()[i]);
  return values;
}

void put_values(const Tensor& tensor, const std::vector<double>& values) {
  for (int64_t i = 0; i < tensor.size(); ++i) {
    const double value = values[static_cast<size_t>(i)];
    if (tensor.dtype == DType::i32)
      tensor.i32()[i] = static_cast<int32_t>(value);
    else
      tensor.f32()[i] = static_cast<float>(value);
  }
}

/// Host float32 to a tensor of any dtype where ctx computes.
void upload(Context& ctx, const Tensor& to, const Tensor& from) {
  OnHost host(ctx, to, /*load=*/false);
  if (to.dtype != DType::bf16) {
    Context cpu;
    cpu.threads = ctx.threads;
    copy_tensor(cpu, *host, from);
  } else {
    parallel_for(ctx, from.size(), 4096, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) host->bf16()[i] = to_bf16(from.f32()[i]);
    });
  }
  host.store();
}

double element(const Tensor& tensor, int64_t i) {
  return tensor.dtype == DType::bf16 ? to_float(tensor.bf16()[i]) : tensor.f32()[i];
}

/// Empty, or what is wrong with `got`: an element further than tolerance (|want| + rms(want)) from `want`, or
/// all of it further than `distance` times its norm. A NaN is wrong.
std::string difference(const std::string& name, const Tensor& got, const Tensor& want, double tolerance,
                       double distance) {
  double squares = 0, errors = 0;
#pragma omp parallel for reduction(+ : squares, errors)
  for (int64_t i = 0; i < want.size(); ++i) {
    const double w = element(want, i), error = element(got, i) - w;
    squares += w * w;
    errors += error * error;
  }
  const double typical = std::sqrt(squares / static_cast<double>(std::max<int64_t>(1, want.size())));
  int64_t first = want.size(), wrong = 0;
#pragma omp parallel for reduction(min : first) reduction(+ : wrong)
  for (int64_t i = 0; i < want.size(); ++i) {
    const double w = element(want, i);
    if (std::abs(element(got, i) - w) <= tolerance * (std::abs(w) + typical)) continue;
    first = std::min(first, i);
    ++wrong;
  }
  if (wrong > 0)
    return fmt::format("{}[{}] is {}, want {}; {} of {} wrong", name, first, element(got, first),
                       element(want, first), wrong, want.size());
  if (!(errors <= distance * distance * squares))
    return fmt::format("{} is {:.4f} of its norm away", name, std::sqrt(errors / squares));
  return "";
}

/// Plans a tensor per operand, those that share memory once; after allocation, share() completes the map.
void plan(Arena& arena, Tensors& tensors, const OpCase& op_case, DType half) {
  for (const Operand& operand : op_case.operands)
    if (operand.same_as.empty())
      arena.add(&tensors[operand.name],
                operand.below > 0 ? DType::i32
                : operand.half    ? half
                                  : DType::f32,
                operand.shape);
}
void share(Tensors& tensors, const OpCase& op_case) {
  for (const Operand& operand : op_case.operands)
    if (!operand.same_as.empty()) tensors[operand.name] = tensors.at(operand.same_as).view(operand.shape);
}
}  // namespace

const char* name_of(Against against) {
  switch (against) {
    case Against::oracle:
      return "float64";
    case Against::cpu:
      return "cpu";
    case Against::reference:
      return "loops";
    case Against::none:
      return "unchecked";
  }
  return "";
}

CaseRun::CaseRun(Context& ctx, const OpCase& shipped) : ctx_(ctx), shipped_(shipped) {
  use_cpu(cpu_, ctx.threads);
  plan(inputs_arena_, inputs_, shipped, DType::f32);
  plan(operands_arena_, operands_, shipped, ctx.dtype);
  for (const Operand& operand : shipped.operands)
    if (operand.output) {
      const std::string& owner = operand.same_as.empty() ? operand.name : operand.same_as;
      first_arena_.add(&first_[owner], operands_.at(owner).dtype, operands_.at(owner).shape);
    }
  inputs_arena_.allocate(cpu_);
  operands_arena_.allocate(ctx);
  first_arena_.allocate(ctx);
  fill();
  share(inputs_, shipped);
  share(operands_, shipped);
}

/// Rounds the inputs to what the device will store.
void CaseRun::round_inputs() {
  for (const auto& [name, tensor] : operands_) {
    if (tensor.dtype != DType::bf16) continue;
    float* x = inputs_.at(name).f32();
    parallel_for(cpu_, tensor.size(), 4096, [=](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) x[i] = to_float(to_bf16(x[i]));
    });
  }
}

void CaseRun::fill() {
  uint64_t stream = 0;
  for (const Operand& operand : shipped_.operands)
    if (operand.same_as.empty()) fill_tensor(cpu_, inputs_.at(operand.name), operand, ++stream);
  round_inputs();
  if (shipped_.prepare) {  // from rounded values, as the device would have made them
    Tensors all = inputs_;
    share(all, shipped_);
    Values values = values_of(all);
    shipped_.prepare(values);
    for (const auto& [name, tensor] : inputs_) put_values(tensor, values.at(name));
    round_inputs();
  }
  for (const auto& [name, tensor] : operands_) upload(ctx_, tensor, inputs_.at(name));
  for (const auto& [name, tensor] : first_) copy_tensor(ctx_, tensor, operands_.at(name));
}

void CaseRun::restore() {
  for (const auto& [name, tensor] : first_) copy_tensor(ctx_, operands_.at(name), tensor);
}

void CaseRun::prepare_scratch(Context& ctx) const {
  if (shipped_.scratch_bytes) ctx.scratch.reserve(shipped_.scratch_bytes(ctx));
}

Against CaseRun::against(bool is_candidate) const {
  double elements = 0;
  for (const auto& [name, tensor] : inputs_) elements += static_cast<double>(tensor.size());
  if (shipped_.flops <= kMostOracleFlops && elements <= kMostOracleElements) return Against::oracle;
  if (ctx_.where == Where::gpu || is_candidate) return Against::cpu;
  for (const Variant& variant : all_variants())
    if (variant.op == op_of(shipped_) && variant.name == "reference") return Against::reference;
  return Against::none;
}

/// The outputs as they should be; computed once.
const Tensors& CaseRun::want(Against against) {
  if (reference_ && reference_->against == against) return reference_->tensors;
  reference_.emplace(against);
  Reference& made = *reference_;
  plan(made.arena, made.tensors, shipped_, DType::f32);
  made.arena.allocate(cpu_);
  for (const auto& [name, tensor] : made.tensors) copy_tensor(cpu_, tensor, inputs_.at(name));
  share(made.tensors, shipped_);
  if (against == Against::oracle) {
    Values values = values_of(made.tensors);
    shipped_.oracle(values);
    for (const Operand& operand : shipped_.operands)
      if (operand.output) put_values(made.tensors.at(operand.name), values.at(operand.name));
    return made.tensors;
  }
  OpCase runner = shipped_;
  if (against == Against::reference)
    for (const Variant& variant : all_variants())
      if (variant.op == op_of(shipped_) && variant.name == "reference")
        runner = make_case(variant.op, shipped_.name.substr(variant.op.size() + 1), &variant.function);
  prepare_scratch(cpu_);
  runner.run(cpu_, made.tensors);
  return made.tensors;
}

std::string CaseRun::check(const OpCase& op_case, bool is_candidate) {
  prepare_scratch(ctx_);
  restore();
  op_case.run(ctx_, operands_);
  const Against by = against(is_candidate);
  if (by == Against::none) return "";
  const Tensors& expected = want(by);
  for (const Operand& operand : shipped_.operands) {
    if (!operand.output) continue;
    const bool half = ctx_.dtype == DType::bf16;
    // The CPU half has an error of its own.
    const double tolerance =
        shipped_.tolerance * (by == Against::oracle ? 1 : 2) + (half ? shipped_.half_tolerance : 0);
    const OnHost got(ctx_, operands_.at(operand.name));
    std::string wrong = difference(operand.name, *got, expected.at(operand.name), tolerance,
                                   half ? kMostHalfDistance : 2 * tolerance);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

double CaseRun::seconds(const OpCase& op_case, Stopwatch& stopwatch) {
  restore();
  return stopwatch.seconds([&] { op_case.run(ctx_, operands_); });
}

Work CaseRun::work() {
  Profile profile;
  ctx_.profile = &profile;
  restore();
  shipped_.run(ctx_, operands_);
  ctx_.profile = nullptr;
  Work total;
  for (const Profile::Row& row : profile.rows()) {
    total.flops += row.work.flops;
    total.bytes += row.work.bytes;
  }
  if (total.flops == 0 && total.bytes == 0) return {.flops = shipped_.flops, .bytes = shipped_.bytes};
  return total;
}
