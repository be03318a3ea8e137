// Every operation, on either device, at any size: checked against a reference, then timed with cold caches
// beside the rooflines of the same run. Candidates (variants.h) run beside what the trainer links.
//
//   harness                                                           the operations of a training step on
//   the CPU harness --device cuda --dtype bf16 --shape B=64,T=1024,chunk=8192 harness --op matmul --shape
//   M=768,N=2304,K=65536,TN --device cuda --dtype bf16 harness --list
//
// The rooflines: bytes per second of a large copy (read plus written), and FLOP per second of a large product
// of the door, both cold. An operation's floor is the larger of its bytes and its FLOPs over those; its share
// is the floor over the median time.
#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>

#include "dev/harness/case_run.h"
#include "dev/harness/cases.h"
#include "json_text.h"
#include "tests/op_cases.h"

namespace {
#ifdef CUDA_ON_CPU
constexpr bool kExecutor = true;  // of dev/cuda_on_cpu: its times say nothing about GPUs
#else
constexpr bool kExecutor = false;
#endif

struct HarnessOptions {
  std::string op, shape, cases, device = "cpu", dtype = "fp32", variant, json;
  double seconds = 0.5;
  int threads = 0;
  bool list = false, names = false, tests = false;
};

/// One line of the table.
struct Result {
  std::string name, variant, against = {}, failure = {};
  std::vector<double> seconds = {};  // sorted
  Work work = {};
  double median() const { return seconds[seconds.size() / 2]; }
};

struct Rooflines {
  double bytes_per_second = 0, flops_per_second = 0;
  /// The least time that this work can take.
  double floor(const Work& work) const {
    return std::max(work.bytes / bytes_per_second, work.flops / flops_per_second);
  }
  bool by_flops(const Work& work) const {
    return work.flops / flops_per_second > work.bytes / bytes_per_second;
  }
};

/// Repetitions that fit into about the time that was asked for, eviction included: 5 to 1000.
int64_t repetitions(double seconds_each, double budget) {
  return std::clamp<int64_t>(static_cast<int64_t>(budget / seconds_each), 5, 1000);
}

/// Keeps Google Benchmark's own report silent: the table is ours.
struct Quiet : benchmark::BenchmarkReporter {
  bool ReportContext(const Context&) override { return true; }
  void ReportRuns(const std::vector<Run>&) override {}
};

/// Times `once`, which returns the seconds of one repetition, in Google Benchmark's loop.
std::vector<double> time(const std::string& name, double budget, const std::function<double()>& once) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  once();
  const double each = std::chrono::duration<double>(Clock::now() - start).count();
  std::vector<double> seconds;
  benchmark::RegisterBenchmark(name.c_str(),
                               [&](benchmark::State& state) {
                                 seconds.clear();
                                 for ([[maybe_unused]] auto repetition : state) {
                                   seconds.push_back(once());
                                   state.SetIterationTime(seconds.back());
                                 }
                               })
      ->UseManualTime()
      ->Iterations(repetitions(each, budget));
  Quiet quiet;
  benchmark::RunSpecifiedBenchmarks(&quiet);
  benchmark::ClearRegisteredBenchmarks();
  std::ranges::sort(seconds);
  return seconds;
}

class Harness {
 public:
  explicit Harness(const HarnessOptions& options);
  /// False when a result was wrong. The report is written anew after every case.
  bool run(const std::vector<OpCase>& cases);

 private:
  void measure_rooflines();
  void run_case(const OpCase& op_case);
  std::optional<Result> run_variant(CaseRun& data, const OpCase& op_case, const std::string& variant);
  void print(const Result& result) const;
  nlohmann::ordered_json report() const;
  void write_report() const;

  const HarnessOptions& options_;
  Context ctx_;
  std::string machine_;
  std::unique_ptr<Stopwatch> stopwatch_;
  Rooflines rooflines_;
  std::vector<Result> results_;
};

Harness::Harness(const HarnessOptions& options) : options_(options) {
  use_cpu(ctx_, options.threads);
  machine_ = fmt::format("CPU, {} threads", ctx_.threads);
  if (options.device == "cuda") {
    use_gpu(ctx_, 0, options.dtype == "bf16" ? DType::bf16 : DType::f32);
    if constexpr (kHaveGpu) machine_ = gpu::info(*ctx_.device).name;
  } else if (options.dtype != "fp32") {
    throw std::runtime_error("the CPU computes in fp32, --dtype, leave it out or use --device cuda");
  }
  stopwatch_ = std::make_unique<Stopwatch>(ctx_);
}

void Harness::measure_rooflines() {
  const int64_t n = kExecutor                  ? int64_t{1} << 16
                    : ctx_.where == Where::gpu ? int64_t{1} << 28
                                               : int64_t{1} << 26;
  Arena arena("copy");
  Tensor from, to;
  arena.add(&from, {n});
  arena.add(&to, {n});
  arena.allocate(ctx_);
  const std::vector<double> copies = time(
      "copy", options_.seconds, [&] { return stopwatch_->seconds([&] { copy_tensor(ctx_, to, from); }); });
  rooflines_.bytes_per_second = 2.0 * static_cast<double>(from.bytes()) / copies[copies.size() / 2];
  const int64_t side = kExecutor ? 48 : ctx_.where == Where::gpu ? 8192 : 2048;
  const OpCase large = matmul_case(side, side, side, kNN);
  CaseRun data(ctx_, large);
  data.seconds(large, *stopwatch_);  // the first product sets things up
  const std::vector<double> products =
      time("product", options_.seconds, [&] { return data.seconds(large, *stopwatch_); });
  rooflines_.flops_per_second = large.flops / products[products.size() / 2];
}

/// Nothing when a candidate says, by a ShapeError, that such a case is not for it.
std::optional<Result> Harness::run_variant(CaseRun& data, const OpCase& op_case, const std::string& variant) {
  Result result{.name = op_case.name, .variant = variant};
  const bool is_candidate = variant != "shipped";
  result.against = name_of(data.against(is_candidate));
  try {
    result.failure = data.check(op_case, is_candidate);
    if (!result.failure.empty()) return result;
    result.work = data.work();
    result.seconds = time(op_case.name + " " + variant, options_.seconds,
                          [&] { return data.seconds(op_case, *stopwatch_); });
  } catch (const ShapeError& error) {
    if (is_candidate) return {};
    result.failure = error.what();
  } catch (const std::exception& error) {
    result.failure = error.what();
  }
  return result;
}

void Harness::run_case(const OpCase& op_case) {
  CaseRun data(ctx_, op_case);
  const auto add = [&](const OpCase& made, const std::string& name) {
    const std::optional<Result> result = run_variant(data, made, name);
    if (!result) return;
    results_.push_back(*result);
    print(*result);
  };
  const std::string op = op_of(op_case), &wanted = options_.variant;
  if (wanted.empty() || wanted == "shipped") add(op_case, "shipped");
  for (const Variant& variant : all_variants()) {
    const bool chosen =
        wanted.empty() ? variant.name != "reference" : variant.name == wanted;  // that one is slow
    if (variant.op == op && variant.where == ctx_.where && chosen)
      add(make_case(op, op_case.name.substr(op.size() + 1), &variant.function), variant.name);
  }
}

void Harness::print(const Result& r) const {
  if (!r.failure.empty()) {
    fmt::print("{:58} {:10} {:10} FAILED: {}\n", r.name, r.variant, r.against, r.failure);
  } else {
    const bool by_flops = rooflines_.by_flops(r.work);
    const double rate = (by_flops ? r.work.flops / 1e12 : r.work.bytes / 1e9) / r.median();
    fmt::print("{:58} {:10} {:10} {:9.4f} {:9.4f} {:9.4f} {:8.{}f} {:8} {:6.0f} %\n", r.name, r.variant,
               r.against, 1e3 * r.median(), 1e3 * r.seconds.front(), 1e3 * r.seconds.back(), rate,
               by_flops ? 3 : 1, by_flops ? "TFLOP/s" : "GB/s", 100 * rooflines_.floor(r.work) / r.median());
  }
  std::fflush(stdout);
}

bool Harness::run(const std::vector<OpCase>& cases) {
  measure_rooflines();
  fmt::print("{}, {}: copy {:.1f} GB/s, product {:.3f} TFLOP/s{}\n\n", machine_, options_.dtype,
             rooflines_.bytes_per_second / 1e9, rooflines_.flops_per_second / 1e12,
             kExecutor && options_.device == "cuda" ? " (the executor: no speed of any GPU)" : "");
  fmt::print("{:58} {:10} {:10} {:>9} {:>9} {:>9} {:>17} {:>8}\n", "operation", "variant", "checked by",
             "median ms", "min", "max", "rate", "of roof");
  for (const OpCase& op_case : cases) {
    try {
      run_case(op_case);
    } catch (const std::exception& error) {  // the data does not fit, say
      results_.push_back({.name = op_case.name, .variant = "shipped", .failure = error.what()});
      print(results_.back());
    }
    write_report();
  }
  return std::ranges::all_of(results_, [](const Result& r) { return r.failure.empty(); });
}

nlohmann::ordered_json Harness::report() const {
  nlohmann::ordered_json rows = nlohmann::json::array();
  for (const Result& r : results_) {
    nlohmann::ordered_json row{{"case", r.name}, {"variant", r.variant}, {"checked_by", r.against}};
    if (!r.failure.empty()) {
      row["failure"] = r.failure;
    } else {
      row["median_ms"] = 1e3 * r.median();
      row["min_ms"] = 1e3 * r.seconds.front();
      row["max_ms"] = 1e3 * r.seconds.back();
      row["repetitions"] = r.seconds.size();
      row["flops"] = r.work.flops;
      row["bytes"] = r.work.bytes;
      row["limit"] = rooflines_.by_flops(r.work) ? "flops" : "bytes";
      row["share_of_roofline"] = rooflines_.floor(r.work) / r.median();
    }
    rows.push_back(row);
  }
  return {{"machine", machine_},
          {"device", options_.device},
          {"dtype", options_.dtype},
          {"executor", kExecutor && options_.device == "cuda"},
          {"copy_bytes_per_second", rooflines_.bytes_per_second},
          {"product_flops_per_second", rooflines_.flops_per_second},
          {"results", rows}};
}

void Harness::write_report() const {
  if (options_.json.empty()) return;
  const std::string part = options_.json + ".part";  // whoever stops us finds a whole file
  std::ofstream file(part);
  file << json_text(report(), 1) << "\n";
  file.close();
  if (!file || std::rename(part.c_str(), options_.json.c_str()) != 0)
    throw std::runtime_error("cannot write, " + options_.json + ", check the path");
}

void list() {
  fmt::print("{:20} {:12} {}\n", "operation", "sizes", "words");
  for (const OpHelp& help : known_operations())
    fmt::print("{:20} {:12} {}\n", help.op, help.sizes, help.words);
  fmt::print(
      "\nand f64: everything in float64, where an operation has that\n\nvariants beside the shipped one:\n");
  for (const Variant& v : all_variants())
    fmt::print("{:20} {:12} {}\n", v.op, v.name, v.where == Where::gpu ? "cuda" : "cpu");
}

int run_harness(const HarnessOptions& options) {
  const std::vector<OpCase> cases = options.tests            ? test_cases()
                                    : !options.cases.empty() ? read_cases(options.cases)
                                                             : choose_cases(options.op, options.shape);
  if (options.names) {
    for (const OpCase& op_case : cases) fmt::print("{}\n", op_case.name);
    return 0;
  }
  return Harness(options).run(cases) ? 0 : 1;
}
}  // namespace

int main(int argc, char** argv) {
  HarnessOptions o;
  CLI::App app{"Checks and times operations against the rooflines of this machine.", "harness"};
  app.add_option("--op", o.op, "only this operation; --list names them");
  app.add_option("--shape", o.shape, "sizes of one case, or of the training step: B,T,C,NH,V,chunk");
  app.add_option("--cases", o.cases, "file of case names, one a line, in place of --op and --shape");
  app.add_option("--device", o.device)->check(CLI::IsMember({"cpu", "cuda"}))->capture_default_str();
  app.add_option("--dtype", o.dtype, "of activations")
      ->check(CLI::IsMember({"fp32", "bf16"}))
      ->capture_default_str();
  app.add_option("--variant", o.variant, "only this one; shipped is what the trainer runs");
  app.add_option("--seconds", o.seconds, "spent on timing each variant")->check(CLI::Range(0.0, 3600.0));
  app.add_option("--threads", o.threads, "of the CPU, 0 for all cores")->check(CLI::Range(0, 1024));
  app.add_option("--json", o.json, "also write the results to this file");
  app.add_flag("--tests", o.tests, "the small cases of `make test`");
  app.add_flag("--names", o.names, "print the names of the cases and stop");
  app.add_flag("--list", o.list, "operations, their sizes, variants");
  CLI11_PARSE(app, argc, argv);
  try {
    if (o.list) return list(), 0;
    return run_harness(o);
  } catch (const std::exception& error) {
    fmt::print(stderr, "harness: error: {}\n", error.what());
    return 1;
  }
}
