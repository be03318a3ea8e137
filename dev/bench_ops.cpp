// Speed of every operation at training sizes (tests/op_cases.h), beside what the machine can do.
//
//   bench_ops [--filter TEXT] [--threads N] [--seconds S]
//
// Two rooflines are measured in the same run: the rate of a large matrix product and the bandwidth of a large
// copy (bytes read plus bytes written). Each run begins with cold caches, as in a training step, where
// hundreds of megabytes pass between two uses of a tensor. The rate is that of the
// median; the best and the worst run show how quiet the machine was.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>

#include "model/kernels/simd.h"
#include "tests/op_cases.h"

namespace {
struct Timing {
  double median, best, worst;  // seconds
};

class Bench {
 public:
  Bench(int threads, double seconds) : seconds_(seconds) {
    use_cpu(ctx_, threads);
    flush_.add(&evicted_, {kFlushBytes / 4});
    flush_.allocate(ctx_);
  }

  /// Repeats `body` for about the time that was asked for, at least five times.
  template <typename Body>
  Timing time(Body&& body) {
    using Clock = std::chrono::steady_clock;
    std::vector<double> seconds;
    body();  // first calls set things up
    double total = 0;
    while (seconds.size() < 5 || (total < seconds_ && seconds.size() < 1000)) {
      evict();
      const auto start = Clock::now();
      body();
      seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
      total += seconds.back();
    }
    std::sort(seconds.begin(), seconds.end());
    return {seconds[seconds.size() / 2], seconds.front(), seconds.back()};
  }

  Timing time(const OpCase& op_case);
  /// Bytes per second of a copy, read and written.
  double copy_bandwidth();
  /// FLOP per second of a large product.
  double product_rate() {
    const OpCase large = matmul_case(2048, 2048, 2048, kNN);
    return large.flops / time(large).median;
  }

  int threads() const { return ctx_.threads; }

 private:
  static constexpr int64_t kFlushBytes = int64_t{256} << 20;  // beyond any cache

  /// Fills the caches with something else.
  void evict() {
    float* memory = evicted_.f32();
    parallel_for(ctx_, evicted_.size(), 4096, [=](int64_t begin, int64_t end, int) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) memory[i] += 1.0f;
    });
  }

  double seconds_;
  Context ctx_;
  Arena flush_{"bench"};
  Tensor evicted_;
};

/// Cheap values of about the right size; the normal distribution of the tests would take longer than the
/// runs.
void fill(const Tensor& tensor, const Operand& operand) {
  uint64_t state = 88172645463325252u;
  for (int64_t i = 0; i < tensor.size(); ++i) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    if (operand.below > 0) {
      tensor.i32()[i] = static_cast<int32_t>(state % static_cast<uint64_t>(operand.below));
    } else {
      const double uniform = static_cast<double>(state >> 11) * 0x1p-53 * 2 - 1;
      tensor.f32()[i] = static_cast<float>(operand.offset + operand.scale * 1.7 * uniform);
    }
  }
}

Timing Bench::time(const OpCase& op_case) {
  if (op_case.scratch_bytes) ctx_.scratch.reserve(op_case.scratch_bytes(ctx_));
  Arena arena(op_case.name);
  Tensors tensors;
  for (const Operand& operand : op_case.operands) {
    if (!operand.same_as.empty()) continue;
    arena.add(&tensors[operand.name], operand.below > 0 ? DType::i32 : DType::f32, operand.shape);
  }
  arena.allocate(ctx_);
  for (const Operand& operand : op_case.operands)
    if (operand.same_as.empty()) fill(tensors[operand.name], operand);
  for (const Operand& operand : op_case.operands)
    if (!operand.same_as.empty()) tensors[operand.name] = tensors[operand.same_as];
  return time([&] { op_case.run(ctx_, tensors); });
}

double Bench::copy_bandwidth() {
  Tensor from, to;
  Arena arena("copy");
  arena.add(&from, {kFlushBytes / 4});
  arena.add(&to, {kFlushBytes / 4});
  arena.allocate(ctx_);
  const float* source = from.f32();
  float* target = to.f32();
  const Timing timing = time([&] {
    parallel_for(ctx_, from.size(), 4096, [=](int64_t begin, int64_t end, int) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) target[i] = source[i];
    });
  });
  return 2.0 * kFlushBytes / timing.median;
}
}  // namespace

int main(int argc, char** argv) {
  std::string filter;
  int threads = 0;
  double seconds = 0.5;
  CLI::App app{"Speed of every operation at training sizes."};
  app.add_option("--filter", filter, "only cases whose name contains this");
  app.add_option("--threads", threads, "threads, 0 for all cores")->check(CLI::Range(0, 1024));
  app.add_option("--seconds", seconds, "time spent on each case")->check(CLI::Range(0.0, 3600.0));
  CLI11_PARSE(app, argc, argv);

  Bench bench(threads, seconds);
  const double bandwidth = bench.copy_bandwidth(), rate = bench.product_rate();
  fmt::print("{} threads; copy {:.1f} GB/s, matrix product {:.1f} GFLOP/s\n\n", bench.threads(),
             bandwidth / 1e9, rate / 1e9);
  fmt::print("{:60} {:>9} {:>9} {:>9} {:>15} {:>9}\n", "operation", "median ms", "best", "worst", "rate",
             "roofline");
  for (const OpCase& op_case : training_cases()) {
    if (op_case.name.find(filter) == std::string::npos) continue;
    const Timing t = bench.time(op_case);
    const bool by_flops = op_case.flops > 0;
    const double achieved = (by_flops ? op_case.flops : op_case.bytes) / t.median;
    fmt::print("{:60} {:9.3f} {:9.3f} {:9.3f} {:7.1f} {:7} {:8.0f}%\n", op_case.name, t.median * 1e3,
               t.best * 1e3, t.worst * 1e3, achieved / 1e9, by_flops ? "GFLOP/s" : "GB/s",
               100 * achieved / (by_flops ? rate : bandwidth));
  }
}
