#include "model/kernels/gemm.h"

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <map>
#include <optional>
#include <stdexcept>
#include <utility>

#include "model/kernels/bias.h"
#include "model/kernels/cuda.h"
#include "model/kernels/gelu.h"
#include "model/kernels/gemm_cache.h"

namespace {
using Clock = std::chrono::steady_clock;

constexpr int kMostAlgorithms = 16;
constexpr double kScreening = 0.012;  // seconds: about how long algorithms are tried once each,
constexpr size_t kFewest = 3;         // but never fewer of them
constexpr double kCloseToBest = 1.2;  // those within this factor of the best are timed again
constexpr size_t kFinalists = 3;
constexpr int kRounds = 4;
constexpr double kTie = 1.01;  // the library's own order decides between times this close

/// All that the choice of an algorithm may depend on, by name in the file.
constexpr const char* kKeyNames[] = {"batch",    "M",    "N",   "K",  "ta", "tb", "in",    "out", "lda",
                                     "ldb",      "ldc",  "ldd", "sa", "sb", "sc", "sd",    "add", "inplace",
                                     "epilogue", "bias", "aa",  "ab", "ac", "ad", "abias", "aaux"};
using Key = std::array<int64_t, std::size(kKeyNames)>;

Key key_of(const Gemm& g) {
  const bool add = g.beta != 0;
  const GemmMatrix& c = add ? g.c : g.d;
  return {g.batch,
          g.M,
          g.N,
          g.K,
          g.transpose_a,
          g.transpose_b,
          static_cast<int64_t>(g.a.dtype),
          static_cast<int64_t>(g.d.dtype),
          g.a.ld,
          g.b.ld,
          c.ld,
          g.d.ld,
          g.a.stride,
          g.b.stride,
          c.stride,
          g.d.stride,
          add,
          add && c.data == g.d.data,
          static_cast<int64_t>(g.epilogue),
          g.bias != nullptr,
          gemm_alignment(g.a.data),
          gemm_alignment(g.b.data),
          gemm_alignment(c.data),
          gemm_alignment(g.d.data),
          gemm_alignment(g.bias),
          gemm_alignment(g.aux)};
}

std::string text_of(const Key& key) {
  std::string text;
  for (size_t i = 0; i < key.size(); ++i)
    text += std::string(i == 0 ? "" : " ") + kKeyNames[i] + "=" + std::to_string(key[i]);
  return text;
}

/// What a device knows of products: gpu::Device::gemm.
struct Gemms {
  std::unique_ptr<GemmLibrary> library;
  GemmOptions options;
  std::string gpu;
  GemmPlans file;  // as loaded, and what this run added
  std::map<Key, GemmPlan> plans;
  bool save = false;  // until saving fails once
};

Gemms& gemms_of(Context& ctx) {
  gpu::Device& device = *ctx.device;
  if (!device.gemm) {
    auto made = std::make_shared<Gemms>();
    made->library = gpu::open_gemm_library(device);
    made->gpu = gpu::info(device).name;
    device.gemm = std::move(made);
  }
  return *static_cast<Gemms*>(device.gemm.get());
}

void check(const Gemm& g) {
  const auto fits = [&](const GemmMatrix& m, int64_t rows, int64_t cols) {
    return m.data != nullptr && m.ld >= cols && (g.batch == 1 || m.stride >= (rows - 1) * m.ld + cols);
  };
  expect(g.batch > 0 && g.M > 0 && g.N > 0 && g.K > 0, "gemm: empty");
  expect(fits(g.a, g.transpose_a ? g.K : g.M, g.transpose_a ? g.M : g.K), "gemm: a too small or absent");
  expect(fits(g.b, g.transpose_b ? g.N : g.K, g.transpose_b ? g.K : g.N), "gemm: b too small or absent");
  expect(fits(g.d, g.M, g.N), "gemm: d too small or absent");
  expect(g.beta == 0 || (fits(g.c, g.M, g.N) && g.c.dtype == g.d.dtype), "gemm: c does not fit d");
  const bool doubles = g.a.dtype == DType::f64;
  expect(g.b.dtype == g.a.dtype, "gemm: a and b differ in dtype");
  expect(doubles == (g.d.dtype == DType::f64), "gemm: f64 needs a, b and d to be f64");
  expect(!doubles || (g.bias == nullptr && g.epilogue == GemmEpilogue::none),
         "gemm: no bias and no epilogue in f64");
  if (g.bias != nullptr || g.epilogue != GemmEpilogue::none)
    expect(g.batch == 1 && g.d.ld == g.N, "gemm: an epilogue needs one matrix without gaps");
  if (g.epilogue == GemmEpilogue::gelu || g.epilogue == GemmEpilogue::dgelu)
    expect(g.aux != nullptr && g.aux != g.d.data, "gemm: a GELU needs aux, and not d");
  if (g.epilogue == GemmEpilogue::dbias)
    expect(g.dbias != nullptr && g.transpose_a && g.a.ld == g.M,
           "gemm: dbias needs memory, and a transposed a without gaps");
}

/// Whether we let the library compute this epilogue. Its GELU is the tanh form too, but of unknown accuracy:
/// good enough for results in bf16, whose rounding is far coarser; not for the 1e-5 that f32 must keep.
bool may_fuse(const Gemm& g) {
  switch (g.epilogue) {
    case GemmEpilogue::none:
      return true;
    case GemmEpilogue::gelu:
    case GemmEpilogue::dgelu:
      return g.d.dtype == DType::bf16 && g.N % 8 == 0;  // the library's condition for aux
    case GemmEpilogue::dbias:
      return g.d.dtype == DType::f32 && g.alpha == 1;  // dbias gets the type of d
  }
  return false;
}

// ------------------------------------------------------------------------------------------------ both ways

template <typename T>
__global__ void __launch_bounds__(256) add_bias_kernel(T* d, const T* bias, int64_t n, int64_t N) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < n) d[i] = from_float<T>(to_float(d[i]) + to_float(bias[i % N]));
}

/// For the rare bias that the library refuses, for instance at an odd address.
void add_bias(Context& ctx, const Gemm& g) {
  for_float_type(g.d.dtype, [&]<typename T>(T) {
    launch(ctx, {.grid = blocks_for(g.M * g.N, 256), .block = 256}, add_bias_kernel<T>,
           static_cast<T*>(g.d.data), static_cast<const T*>(g.bias), g.M * g.N, g.N);
  });
}

void run_fused(Context& ctx, Gemms& gemms, const Gemm& g, const GemmAlgorithm& algorithm) {
  if (!g.add_to_dbias) return gemms.library->run(g, algorithm);
  // The library overwrites: its sums go to a row of scratch, which is then added like a dy of one row.
  Scratch::Frame frame(ctx.scratch);
  const Tensor sums = frame.tensor({1, g.M});
  Gemm product = g;
  product.dbias = sums.f32();
  product.add_to_dbias = false;
  gemms.library->run(product, algorithm);
  bias_backward(ctx, {.dbias = Tensor(g.dbias, Shape{g.M}), .dy = sums, .accumulate = true});
}

/// The plain product, and the epilogue by kernels of ours.
void run_apart(Context& ctx, const Gemm& g) {
  Gemm plain = g;
  plain.epilogue = GemmEpilogue::none;
  plain.aux = nullptr;
  plain.dbias = nullptr;
  plain.add_to_dbias = false;
  const Tensor d(g.d.data, g.d.dtype, {g.M, g.N}), aux(g.aux, g.d.dtype, {g.M, g.N});
  switch (g.epilogue) {
    case GemmEpilogue::none:
      plain.bias = nullptr;
      gpu::gemm(ctx, plain);
      return add_bias(ctx, g);
    case GemmEpilogue::gelu:
      plain.d.data = g.aux;
      gpu::gemm(ctx, plain);
      return gelu_forward(ctx, {.y = d, .x = aux});
    case GemmEpilogue::dgelu:
      gpu::gemm(ctx, plain);
      return gelu_backward(ctx, {.dx = d, .dy = d, .x = aux});
    case GemmEpilogue::dbias:
      gpu::gemm(ctx, plain);
      return bias_backward(ctx, {.dbias = Tensor(g.dbias, Shape{g.M}),
                                 .dy = Tensor(g.a.data, g.a.dtype, {g.K, g.M}),
                                 .accumulate = g.add_to_dbias});
  }
}

// ---------------------------------------------------------------------------------------------- the choice

/// The same product with outputs that may be written any number of times, as well aligned as the real ones.
struct Trial {
  Gemm gemm;

  Trial(Context& ctx, const Gemm& real) : gemm(real) {
    if (real.beta != 0 && real.c.data == real.d.data) {
      const int64_t elements = (real.batch - 1) * real.d.stride + real.M * real.d.ld;
      gemm.c.data = gemm.d.data = instead_of(ctx, d_, real.d.data, elements * dtype_bytes(real.d.dtype));
    }
    if (real.dbias != nullptr)
      gemm.dbias = static_cast<float*>(instead_of(ctx, dbias_, real.dbias, real.M * int64_t{sizeof(float)}));
  }

 private:
  static void* instead_of(Context& ctx, Memory& memory, const void* real, int64_t bytes) {
    memory = Memory(ctx, bytes + kAlign, "timing matrix products");
    return memory.data() + reinterpret_cast<uintptr_t>(real) % kAlign;
  }
  Memory d_, dbias_;
};

/// No profile while this lives: it would wait for every operation, and count those that are only timed.
struct Unprofiled {
  explicit Unprofiled(Context& ctx) : ctx(ctx), profile(std::exchange(ctx.profile, nullptr)) {}
  ~Unprofiled() { ctx.profile = profile; }
  Unprofiled(const Unprofiled&) = delete;
  Unprofiled& operator=(const Unprofiled&) = delete;
  Context& ctx;
  Profile* const profile;
};

struct Timed {
  GemmAlgorithm algorithm;
  double seconds;
};

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Tries each algorithm once, the likely fastest first, as long as there is time. Those that fail are passed
/// over; `why` is what the last of them said.
std::vector<Timed> screen(GemmLibrary& library, const Gemm& g, std::string& why) {
  std::vector<Timed> timed;
  const auto start = Clock::now();
  for (const GemmAlgorithm& algorithm : library.algorithms(g, kMostAlgorithms)) {
    const auto run = [&] { library.run(g, algorithm); };
    try {
      run();  // the first launch loads the kernel
      timed.push_back({algorithm, library.time(run)});
    } catch (const std::runtime_error& error) {
      why = error.what();
      continue;
    }
    if (timed.size() >= kFewest && seconds_since(start) > kScreening) break;
  }
  return timed;
}

/// The fastest of the library's algorithms; none when all fail.
std::optional<Timed> fastest(GemmLibrary& library, const Gemm& g, std::string& why) {
  std::vector<Timed> timed = screen(library, g, why);
  if (timed.empty()) return std::nullopt;
  std::vector<double> sorted;
  for (const Timed& t : timed) sorted.push_back(t.seconds);
  std::ranges::sort(sorted);
  const double limit = std::min(sorted[0] * kCloseToBest, sorted[std::min(kFinalists, sorted.size()) - 1]);
  std::erase_if(timed, [&](const Timed& t) { return t.seconds > limit; });
  const auto start = Clock::now();
  for (int round = 0; round < kRounds && (round == 0 || seconds_since(start) < kScreening); ++round)
    for (Timed& t : timed)
      t.seconds = std::min(t.seconds, library.time([&] { library.run(g, t.algorithm); }));
  const double best = std::ranges::min(timed, {}, &Timed::seconds).seconds;
  return *std::ranges::find_if(timed, [&](const Timed& t) { return t.seconds <= best * kTie; });
}

/// Whether the fused way beats ours, each timed in turns.
bool fused_is_faster(Context& ctx, Gemms& gemms, const Gemm& g, const GemmAlgorithm& algorithm) {
  double fused = std::numeric_limits<double>::infinity(), apart = fused;
  run_apart(ctx, g);  // makes its plans
  for (int round = 0; round < kRounds; ++round) {
    fused = std::min(fused, gemms.library->time([&] { run_fused(ctx, gemms, g, algorithm); }));
    apart = std::min(apart, gemms.library->time([&] { run_apart(ctx, g); }));
  }
  return fused * kTie < apart;
}

[[noreturn]] void refuse(const Gemms& gemms, const Key& key, const std::string& why) {
  throw std::runtime_error("no algorithm of " + gemms.library->name() + " for the matrix product " +
                           text_of(key) + (why.empty() ? "" : " (" + why + ")") +
                           ", use another --dtype or batch size");
}

/// Whether the epilogue can be taken away from the library. A plain product is all that the library is for.
bool has_other_way(const Gemm& g) {
  return g.epilogue != GemmEpilogue::none || g.bias != nullptr;
}

GemmPlan first_suggestion(Gemms& gemms, const Gemm& g, const Key& key) {
  using Epilogues = GemmOptions::Epilogues;
  const bool fuse =
      g.epilogue == GemmEpilogue::none || (may_fuse(g) && gemms.options.epilogues == Epilogues::fused);
  const std::vector<GemmAlgorithm> algorithms =
      fuse ? gemms.library->algorithms(g, 1) : std::vector<GemmAlgorithm>{};
  if (!algorithms.empty()) return {.fused = true, .algorithm = algorithms[0]};
  if (!has_other_way(g)) refuse(gemms, key, "");
  return {.fused = false};
}

GemmPlan measure(Context& ctx, Gemms& gemms, const Gemm& g, const Key& key) {
  using Epilogues = GemmOptions::Epilogues;
  const bool fuse =
      g.epilogue == GemmEpilogue::none || (may_fuse(g) && gemms.options.epilogues != Epilogues::apart);
  std::string why;
  std::optional<Timed> best;
  Gemm product = g;
  product.add_to_dbias = false;  // is not the library's: run_fused
  if (fuse) best = fastest(*gemms.library, product, why);
  if (!best && !has_other_way(g)) refuse(gemms, key, why);
  if (!best) return {.fused = false};
  const bool undecided = g.epilogue != GemmEpilogue::none && gemms.options.epilogues == Epilogues::measured;
  if (undecided && !fused_is_faster(ctx, gemms, g, best->algorithm)) return {.fused = false};
  return {.fused = true, .algorithm = best->algorithm};
}

GemmPlan choose(Context& ctx, Gemms& gemms, const Gemm& g, const Key& key) {
  const std::string& path = gemms.options.cache_file;
  if (path.empty()) return first_suggestion(gemms, g, key);
  const std::string text = text_of(key);
  const auto kept = gemms.file.find(text);
  if (kept != gemms.file.end()) {
    const GemmPlan& plan = kept->second;
    if (plan.fused ? may_fuse(g) && gemms.library->accepts(g, plan.algorithm) : has_other_way(g)) return plan;
  }
  if (gemms.library->capturing()) return first_suggestion(gemms, g, key);
  const Unprofiled unprofiled(ctx);
  std::optional<Trial> trial;
  try {
    trial.emplace(ctx, g);
  } catch (const std::runtime_error&) {  // no memory to time in
    return first_suggestion(gemms, g, key);
  }
  const GemmPlan plan = measure(ctx, gemms, trial->gemm, key);
  gemms.file[text] = plan;
  if (gemms.save) gemms.save = save_gemm_plans(path, gemms.gpu, gemms.library->name(), gemms.file);
  return plan;
}
}  // namespace

// ------------------------------------------------------------------------------------------------ interface

void gpu::gemm(Context& ctx, const Gemm& g) {
  check(g);
  Gemms& gemms = gemms_of(ctx);
  const Key key = key_of(g);
  auto found = gemms.plans.find(key);
  if (found == gemms.plans.end()) found = gemms.plans.emplace(key, choose(ctx, gemms, g, key)).first;
  if (found->second.fused)
    run_fused(ctx, gemms, g, found->second.algorithm);
  else
    run_apart(ctx, g);
}

void gpu::set_gemm_options(Context& ctx, const GemmOptions& options) {
  Gemms& gemms = gemms_of(ctx);
  gemms.options = options;
  gemms.plans.clear();
  gemms.file.clear();
  gemms.save = !options.cache_file.empty();
  if (gemms.save) gemms.file = load_gemm_plans(options.cache_file, gemms.gpu, gemms.library->name());
}

std::string gpu::default_gemm_cache(Context& ctx) {
  const Gemms& gemms = gemms_of(ctx);
  const char *cache = std::getenv("XDG_CACHE_HOME"), *home = std::getenv("HOME");
  std::string folder;
  if (cache != nullptr && *cache == '/')  // others are to be ignored, says the XDG specification
    folder = cache;
  else if (home != nullptr && *home != '\0')
    folder = std::string(home) + "/.cache";
  else
    return "";
  std::string name = "gemm-" + gemms.gpu + "-" + gemms.library->name();
  for (char& c : name)
    if (std::isalnum(static_cast<unsigned char>(c)) == 0 && c != '.') c = '-';
  return folder + "/anthology/" + name + ".json";
}

void gpu::use_gemm_library(Context& ctx, std::unique_ptr<GemmLibrary> library) {
  Gemms& gemms = gemms_of(ctx);
  gemms.library = std::move(library);
  set_gemm_options(ctx, gemms.options);
}
