#include "optim/polar_method.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <optional>
#include <string_view>

#include "error.h"
#include "keyed.h"
#include "optim/polar_band.h"

namespace {
using Kind = PolarMethod::Kind;
constexpr int kMostSteps = 1000;  // of a user's coefficients

constexpr Quintic kKellerStep = {3.4445, -4.7750, 2.0315}, kConvergentStep = {2, -1.5, 0.5};
constexpr Quintic kKeller[] = {kKellerStep};
constexpr Quintic kCubic[] = {{1.5, -0.5, 0}};
constexpr Quintic kQuintic[] = {{3, -16.0 / 5, 6.0 / 5}};
constexpr Quintic kConvergent[] = {kConvergentStep};
constexpr Quintic kHybrid[] = {kKellerStep, kKellerStep, kKellerStep, kKellerStep,    kKellerStep,
                               kKellerStep, kKellerStep, kKellerStep, kConvergentStep};
constexpr Quintic kPolarExpress[] = {{8.156554524902461, -22.48329292557795, 15.878769915207462},
                                     {4.042929935166739, -2.808917465908714, 0.5000178451051316},
                                     {3.8916678022926607, -2.772484153217685, 0.5060648178503393},
                                     {3.285753657755655, -2.3681294933425376, 0.46449024233003106},
                                     {2.3465413258596377, -1.7097828382687081, 0.42323551169305323}};
// A safety of 1.01 is part of these numbers.
constexpr Quintic kPolarExpress8[] = {{8.2051, -22.9019, 16.4607}, {4.0664, -2.8612, 0.5184},
                                      {3.9096, -2.8234, 0.5250},   {3.2856, -2.4153, 0.4853},
                                      {2.2779, -1.6198, 0.3985},   {1.8726, -1.2307, 0.3585},
                                      {1.8564, -1.2132, 0.3568},   {1.8750, -1.2500, 0.3750}};
constexpr Quintic kCans[] = {{8.4703, -25.1081, 18.6293},
                             {4.1828, -3.1087, 0.5806},
                             {3.9619, -2.9541, 0.5630},
                             {3.2866, -2.4647, 0.5074},
                             {2.2737, -1.6447, 0.4162}};
constexpr Quintic kYou[] = {{4.0848, -6.8946, 2.9270},
                            {3.9505, -6.3029, 2.6377},
                            {3.7418, -5.5913, 2.3037},
                            {2.8769, -3.1427, 1.2046},
                            {2.8366, -3.0525, 1.2012}};
constexpr Quintic kAol[] = {{4.0098, -7.0585, 2.4635},
                            {3.4585, -5.5479, 2.5959},
                            {2.7573, -3.2939, 1.4254},
                            {2.7215, -3.0494, 1.3169}};
constexpr Quintic kCubic5[] = {{3.3656576, -3.3420992, 0},
                               {2.5744352, -1.4957376, 0},
                               {2.5368962, -1.4312570, 0},
                               {2.4418906, -1.2764040, 0},
                               {2.2230472, -0.9630650, 0}};
constexpr Quintic over_1024(double a, double b, double c) {
  return {a / 1024, b / 1024, c / 1024};
}
constexpr Quintic kModula[] = {over_1024(3955, -8306, 5008), over_1024(3735, -6681, 3463),
                               over_1024(3799, -6499, 3211), over_1024(4019, -6385, 2906),
                               over_1024(2677, -3029, 1162), over_1024(2172, -1833, 682)};

constexpr PolarRow kRows[] = {{"keller5", Kind::newton_schulz, kKeller, 5},
                              {"polar-express", Kind::newton_schulz, kPolarExpress, 5, 1.02},
                              {"polar-express8", Kind::newton_schulz, kPolarExpress8, 8},
                              {"cans5", Kind::newton_schulz, kCans, 5, 1.01},
                              {"you5", Kind::newton_schulz, kYou, 5},
                              {"modula6", Kind::newton_schulz, kModula, 6},
                              {"aol4", Kind::newton_schulz, kAol, 4, 1.17, true},
                              {"cubic5", Kind::newton_schulz, kCubic5, 5},
                              {"hybrid", Kind::newton_schulz, kHybrid, 10},
                              {"quintic12", Kind::newton_schulz, kConvergent, 12},
                              {"quintic", Kind::newton_schulz, kQuintic, 15},
                              {"cubic", Kind::newton_schulz, kCubic, 20},
                              {"svd", Kind::svd, {}, 0},
                              {"newton", Kind::newton, {}, 30},
                              {"sketch", Kind::sketch, {}, 0}};

/// The first `count` steps, of which the last repeats; all of them for 0.
std::vector<Quintic> schedule(std::span<const Quintic> steps, int count) {
  std::vector<Quintic> list;
  for (size_t k = 0; k < (count > 0 ? static_cast<size_t>(count) : steps.size()); ++k)
    list.push_back(steps[std::min(k, steps.size() - 1)]);
  return list;
}

std::vector<std::string_view> split(std::string_view text, char at) {
  std::vector<std::string_view> parts;
  for (size_t start = 0; start <= text.size();) {
    const size_t end = std::min(text.find(at, start), text.size());
    parts.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return parts;
}

template <typename T>
std::optional<T> parse(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

/// "a:b:c" or "a:b".
std::optional<Quintic> parse_step(std::string_view text) {
  const std::vector<std::string_view> numbers = split(text, ':');
  if (numbers.size() != 2 && numbers.size() != 3) return std::nullopt;
  const auto a = parse<double>(numbers[0]), b = parse<double>(numbers[1]);
  const auto c = numbers.size() == 3 ? parse<double>(numbers[2]) : std::optional(0.0);
  if (!a || !b || !c || !std::isfinite(*a) || !std::isfinite(*b) || !std::isfinite(*c)) return std::nullopt;
  return Quintic{*a, *b, *c};
}

/// "STEP+STEP+...", each perhaps with "Nx" before it.
std::vector<Quintic> parse_steps(const std::string& text, const std::string& option) {
  std::vector<Quintic> steps;
  for (const std::string_view part : split(text, '+')) {
    const size_t x = part.find('x');
    const auto repeat = x == std::string_view::npos ? std::optional(1) : parse<int>(part.substr(0, x));
    const auto step = parse_step(x == std::string_view::npos ? part : part.substr(x + 1));
    if (!repeat || *repeat < 1 || *repeat > kMostSteps || !step)
      throw UsageError(
          fmt::format("'{}' is not a step, {} {}, write a:b:c or a:b, repeated 8xa:b:c, steps joined by +",
                      part, option, text));
    steps.insert(steps.end(), static_cast<size_t>(*repeat), *step);
  }
  return steps;
}

/// Refuses a schedule that leaves the singular values of (0, 1] far from 1 or with the wrong sign.
void expect_sane(const PolarMethod& method, const std::string& option) {
  const Band band = polar_band(method.steps, {0, 1 / method.safety});
  double slope = 1;
  for (const Quintic& step : method.steps) slope *= step.a;
  if (band.low >= 0 && band.high <= kLargestPolar && slope > 0 && std::isfinite(slope)) return;
  throw UsageError(fmt::format(
      "its {} steps take singular values of (0, 1] into [{:.3g}, {:.3g}] with slope {:.3g} at 0, {} "
      "{}, choose coefficients that stay in [0, {}] (train_gpt polar shows bands)",
      method.steps.size(), band.low, band.high, slope, option, method.name, kLargestPolar));
}

bool is_coefficients(const std::string& text) {
  return !text.empty() &&
         (std::isdigit(static_cast<unsigned char>(text[0])) != 0 || text[0] == '-' || text[0] == '.');
}

PolarMethod from_table(const PolarRow& row, Keyed& keys, int steps, const std::string& option) {
  PolarMethod method{.name = row.name, .kind = row.kind, .safety = row.safety, .aol = row.aol};
  if (row.default_steps == 0 && steps != 0)
    throw UsageError(fmt::format("{} takes no steps, {}, leave steps out", row.name, option));
  const int count = steps > 0 ? steps : row.default_steps;
  if (row.kind == Kind::newton_schulz) method.steps = schedule(row.steps, count);
  if (row.kind == Kind::newton) method.newton_steps = count;
  if (row.kind == Kind::sketch) method.rank = keys.integer("rank", 0, 0, int64_t{1} << 30);
  keys.finish();
  return method;
}
}  // namespace

std::span<const PolarRow> polar_rows() {
  return kRows;
}

std::span<const char* const> polar_names() {
  static constexpr auto kNames = [] {
    std::array<const char*, std::size(kRows)> names{};
    for (size_t i = 0; i < names.size(); ++i) names[i] = kRows[i].name;
    return names;
  }();
  return kNames;
}

PolarMethod polar_method(const std::string& text, int steps, const std::string& option) {
  PolarMethod method;
  if (is_coefficients(text)) {
    method = {.name = text, .kind = Kind::newton_schulz, .steps = schedule(parse_steps(text, option), steps)};
  } else {
    Keyed keys(option, text);
    const auto* row = std::ranges::find_if(kRows, [&](const PolarRow& r) { return keys.name() == r.name; });
    if (row == std::end(kRows))
      throw UsageError(fmt::format("'{}' is unknown, {}, choose coefficients a:b:c or one of: {}", text,
                                   option, listed(polar_names())));
    method = from_table(*row, keys, steps, option);
  }
  if (method.kind == Kind::newton_schulz) expect_sane(method, option);
  return method;
}

double PolarMethod::flops(int64_t rows, int64_t cols) const {
  const auto n = static_cast<double>(std::min(rows, cols)), m = static_cast<double>(std::max(rows, cols));
  double sum = 0;
  switch (kind) {
    case Kind::newton_schulz:
      for (const Quintic& step : steps) sum += 4 * n * n * m + (step.c != 0 ? 2 * n * n * n : 0);
      return sum;
    case Kind::newton:
      return 4 * n * n * m + newton_steps * 6 * n * n * n;
    case Kind::svd:
      return 8 * n * n * m + 20 * n * n * n;
    case Kind::sketch: {
      constexpr double kMoreColumns = 8;
      const double k = std::min(n, (rank > 0 ? static_cast<double>(rank) : n) + kMoreColumns);
      return 14 * n * m * k + 20 * k * k * k;
    }
  }
  return sum;
}

double PolarMethod::apply(double x) const {
  for (const Quintic& step : steps) x = step(x);
  return x;
}
