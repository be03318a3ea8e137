#include "polar_tool.h"

#include <fmt/format.h>

#include <cmath>

#include "error.h"
#include "files.h"
#include "optim/polar_band.h"

namespace {
constexpr int kMostSteps = 100;    // that --within tries
constexpr int kPlotPoints = 1000;  // from least to 1, equally far apart on a logarithmic axis

double slope_at_zero(const PolarMethod& method) {
  double slope = 1 / method.safety;
  for (const Quintic& step : method.steps) slope *= step.a;
  return slope;
}

/// FLOPs over n^3 of a square matrix: X X^T and the last product for every step, A^2 for quintics.
int work_of(const PolarMethod& method) {
  int work = 0;
  for (const Quintic& step : method.steps) work += step.c == 0 ? 4 : 6;
  return work;
}

std::string band_text(const Band& band) {
  return fmt::format("{:>9.6f} .. {:<9.6f}", band.low, band.high);
}

/// Every set of the table, with its own number of steps or the user's.
std::vector<PolarMethod> all_sets(int steps) {
  std::vector<PolarMethod> sets;
  for (const PolarRow& row : polar_rows())
    if (!row.steps.empty()) sets.push_back(polar_method(row.name, steps, "--steps"));
  return sets;
}

void print_sets(const PolarOptions& o) {
  fmt::print("{:<16} {:>5} {:>12} {:>6}   band of [{:g}, 1]\n", "set", "steps", "slope at 0", "work",
             o.least);
  for (const PolarMethod& method : all_sets(o.steps))
    fmt::print("{:<16} {:>5} {:>12.5g} {:>6}   {}\n", method.name, method.steps.size(), slope_at_zero(method),
               work_of(method), band_text(polar_band(method, o.least)));
}

void print_steps(const PolarOptions& o, const PolarMethod& method) {
  fmt::print("{}: X / ({:g} ||X||_F), slope {:g} at 0, work {}\n", method.name, method.safety,
             slope_at_zero(method), work_of(method));
  fmt::print("{:>5} {:>9} {:>9} {:>9}   band of [{:g}, 1]\n", "steps", "a", "b", "c", o.least);
  PolarMethod first = method;
  first.steps.clear();
  for (const Quintic& step : method.steps) {
    first.steps.push_back(step);
    fmt::print("{:>5} {:>9.5g} {:>9.5g} {:>9.5g}   {}\n", first.steps.size(), step.a, step.b, step.c,
               band_text(polar_band(first, o.least)));
  }
}

/// The fewest steps of one schedule, its last step repeated.
void print_within(const PolarOptions& o, const std::string& name, const PolarSchedule& schedule) {
  const int steps = steps_within(schedule, o.least, o.within, kMostSteps);
  if (steps > 0) {
    fmt::print("{:<16} {:>5}\n", name, steps);
    return;
  }
  const Band band = polar_band(polar_method(name, kMostSteps, "--ns"), o.least);
  fmt::print("{:<16} never: {} steps leave {:.6f} .. {:.6f}\n", name, kMostSteps, band.low, band.high);
}

void print_all_within(const PolarOptions& o, const PolarMethod* method) {
  fmt::print("\nfewest steps that take [{:g}, 1] into [{:g}, {:g}]\n", o.least, 1 - o.within, 1 + o.within);
  if (method != nullptr) return print_within(o, method->name, {method->steps, method->safety});
  for (const PolarRow& row : polar_rows())
    if (!row.steps.empty()) print_within(o, row.name, {row.steps, row.safety});
}

/// One line per x: the values of every set, or of one set after each number of steps.
void write_plot(const PolarOptions& o, const PolarMethod* method) {
  const std::vector<PolarMethod> sets =
      method != nullptr ? std::vector<PolarMethod>{*method} : all_sets(o.steps);
  std::string text = "# x";
  if (method == nullptr)
    for (const PolarMethod& set : sets) text += " " + set.name;
  else
    for (size_t k = 1; k <= method->steps.size(); ++k) text += fmt::format(" {}", k);
  for (int i = 0; i <= kPlotPoints; ++i) {
    const double x = std::pow(o.least, 1 - static_cast<double>(i) / kPlotPoints);
    text += fmt::format("\n{:.9g}", x);
    for (const PolarMethod& set : sets) {
      double y = x / set.safety;
      for (const Quintic& step : set.steps) {
        y = step(y);
        if (method != nullptr) text += fmt::format(" {:.9g}", y);
      }
      if (method == nullptr) text += fmt::format(" {:.9g}", y);
    }
  }
  write_text(o.plot, text + "\n", Existing::replace);
}
}  // namespace

int run_polar(const PolarOptions& o) {
  PolarMethod chosen;
  const PolarMethod* method = nullptr;
  if (!o.ns.empty()) {
    chosen = polar_method(o.ns, o.steps, "--ns");
    if (chosen.kind != PolarMethod::Kind::newton_schulz)
      throw UsageError(
          fmt::format("{} is not a polynomial, --ns, name one of the sets that `train_gpt polar` "
                      "lists, or coefficients a:b:c",
                      chosen.name));
    method = &chosen;
  }
  if (method != nullptr)
    print_steps(o, *method);
  else
    print_sets(o);
  if (o.within > 0) print_all_within(o, method);
  if (!o.plot.empty()) {
    write_plot(o, method);
    fmt::print("\nwrote {}\n", o.plot);
  }
  return 0;
}
