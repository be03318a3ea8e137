#include "optim/unit_lines.h"

#include "model/kernels/multiplier.h"
#include "model/kernels/sums.h"
#include "optim/move.h"

// Memory-bound. A row is measured and moved by one thread while it is in the caches; longer rows are shared
// by the threads, twice. Columns are measured and moved in sweeps along the rows.

namespace {
constexpr int64_t kEntryGrain = 16384;  // entries; a thread with fewer costs more than it helps

/// A row, or part of one, that is multiplied by one number.
template <typename T>
struct OfRow {
  const T* g;
  Multiplier<T> by;
  T operator()(int64_t i) const { return g[i] * by.lift * by.scale; }
};

/// A row whose columns have a number each, and with kLifts another before it, which is rarely other than 1.
template <bool kLifts, typename T>
struct OfColumns {
  const T *g, *lifts, *scales;
  int64_t first;  // element of the row
  T operator()(int64_t i) const { return (kLifts ? g[i] * lifts[i - first] : g[i]) * scales[i - first]; }
};

template <typename T>
Multiplier<T> to_length(T norm, double length) {
  return multiplier(norm, static_cast<T>(length), /*divide=*/true);
}

template <typename T>
void unit_rows(Context& ctx, const UnitLines& a) {
  const int64_t rows = a.g.rows(), cols = a.g.cols();
  const T *g = reals_of<T>(a.g), *norms = reals_of<T>(a.norms);
  const cpu::Mover<T> mover(a.u, a.into);
  deal_out(ctx, rows, std::max<int64_t>(1, kEntryGrain / cols), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = g + r * cols;
      const T norm = norms != nullptr ? norms[r] : static_cast<T>(std::sqrt(cpu::sum_of_squares(row, cols)));
      mover.go(r * cols, (r + 1) * cols, OfRow<T>{g, to_length(norm, a.factor)});
    }
  });
}

template <typename T>
void unit_long_rows(Context& ctx, const UnitLines& a) {
  const int64_t cols = a.g.cols();
  const T *g = reals_of<T>(a.g), *norms = reals_of<T>(a.norms);
  const cpu::Mover<T> mover(a.u, a.into);
  for (int64_t r = 0; r < a.g.rows(); ++r) {
    const T norm =
        norms != nullptr ? norms[r] : static_cast<T>(std::sqrt(cpu::sum_of_squares(ctx, a.g.slice(r, 1))));
    const OfRow<T> row{g, to_length(norm, a.factor)};
    deal_out(ctx, cols, kEntryGrain,
             [&](int64_t begin, int64_t end) { mover.go(r * cols + begin, r * cols + end, row); });
  }
}

template <bool kLifts, typename T>
void scale_columns(Context& ctx, const UnitLines& a, const T* lifts, const T* scales) {
  const int64_t cols = a.g.cols();
  const T* g = reals_of<T>(a.g);
  const cpu::Mover<T> mover(a.u, a.into);
  const int64_t grain = std::max<int64_t>(1, kEntryGrain / cols);
  deal_out(ctx, a.g.rows(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      mover.go(r * cols, (r + 1) * cols, OfColumns<kLifts, T>{g, lifts, scales, r * cols});
  });
}

template <typename T>
void unit_columns(Context& ctx, const UnitLines& a) {
  const int64_t cols = a.g.cols();
  Scratch::Frame frame(ctx.scratch);
  const Tensor own = frame.tensor({cols}, a.g.dtype), lifted = frame.tensor({cols}, a.g.dtype);
  if (!a.norms) cpu::col_norms(ctx, {.norms = own, .x = a.g});
  const T* norms = reals_of<T>(a.norms ? a.norms : own);
  T *scales = reals_of<T>(own), *lifts = reals_of<T>(lifted);
  bool lift = false;
  for (int64_t c = 0; c < cols; ++c) {
    const Multiplier<T> by = to_length(norms[c], a.factor);
    lifts[c] = by.lift, scales[c] = by.scale;
    lift = lift || by.lift != 1;
  }
  if (lift) return scale_columns<true, T>(ctx, a, lifts, scales);
  scale_columns<false, T>(ctx, a, lifts, scales);
}
}  // namespace

void cpu::unit_lines(Context& ctx, const UnitLines& args) {
  if (args.g.size() == 0 || std::isnan(read_scale(args.into.guard))) return;
  for_real_type(args.g.dtype, [&]<typename T>(T) {
    if (args.lines == Lines::columns) return unit_columns<T>(ctx, args);
    if (args.g.cols() > cpu::kLongRow) return unit_long_rows<T>(ctx, args);
    unit_rows<T>(ctx, args);
  });
}
