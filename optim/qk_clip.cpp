#include "optim/qk_clip.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <limits>

#include "error.h"
#include "keyed.h"
#include "model/kernels/cast.h"
#include "model/kernels/head_max.h"
#include "model/kernels/simd.h"

namespace cpu {
namespace {
/// Scales the q and the k rows of head h.
void clip_head(const QkClipRows& a, int64_t h) {
  const int64_t NH = a.largest.size(),
                block = a.x.size() / (a.count * NH);  // elements of a head in q, k or v
  const auto S = static_cast<float>(a.largest.f64()[h]);
  if (!(S > a.tau) || !std::isfinite(S)) return;
  for (const bool keys : {false, true}) {
    const int which = (keys ? 1 : 0) - a.first;
    if (which < 0 || which >= a.count) continue;
    const float factor = std::pow(a.tau / S, keys ? 1.0f - a.alpha : a.alpha);
    const int64_t begin = (which * NH + h) * block;
    float* const x = a.x.f32();
    for (int64_t i = begin; i < begin + block; ++i) x[i] *= factor;
    if (a.copy)
      for (int64_t i = begin; i < begin + block; ++i) a.copy.bf16()[i] = to_bf16(x[i]);
  }
}
}  // namespace

void qk_clip(Context& ctx, std::span<const QkClipRows> list) {
  for (const QkClipRows& a : list) {
    if (a.guard && std::isnan(*a.guard.f32())) continue;
    parallel_for(ctx, a.largest.size(), 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t h = begin; h < end; ++h) clip_head(a, h);
    });
  }
}
}  // namespace cpu

std::string QkClipOptions::str() const {
  return on() ? fmt::format("{:g}:alpha={:g}", tau, alpha) : "";
}

QkClipOptions parse_qk_clip(const std::string& option, const std::string& text) {
  QkClipOptions options;
  if (text.empty()) return options;
  Keyed keys(option, text);
  const std::string& tau = keys.name();
  const auto [end, error] = std::from_chars(tau.data(), tau.data() + tau.size(), options.tau);
  if (error != std::errc() || end != tau.data() + tau.size() || !(options.tau >= 1e-6 && options.tau <= 1e6))
    throw UsageError(
        fmt::format("'{}' is not a number in [1e-06, 1e+06], {} {}, give the largest attention logit, "
                    "such as {} 100",
                    tau, option, text, option));
  options.alpha = keys.number("alpha", 0.5, 0, 1);
  keys.finish();
  return options;
}

QkClip::QkClip(Context& ctx, ParameterTable& table, const Tensor& max_logits, const QkClipOptions& options)
    : ctx_(ctx), max_logits_(max_logits), readback_(ctx, max_logits.size()) {
  for (int64_t l = 0; l < max_logits.shape[0]; ++l)
    for (const char* part : {"weight", "bias"}) {
      const Parameter& p = table.at(fmt::format("h.{}.attn.c_attn.{}", l, part));
      const int64_t C = p.shape[0] / 3;
      for (const MasterRows& m : p.masters) {  // whole matrices: owners have no less
        const int64_t rows = m.values.shape[0];
        expect(m.first % C == 0 && rows % C == 0, "QkClip: a master of q, k and v is cut between heads");
        rows_.push_back({.x = m.values,
                         .first = static_cast<int>(m.first / C),
                         .count = static_cast<int>(rows / C),
                         .copy = p.compute.data == p.value.data ? Tensor{} : p.compute.slice(m.first, rows),
                         .largest = max_logits[l],
                         .tau = static_cast<float>(options.tau),
                         .alpha = static_cast<float>(options.alpha)});
      }
    }
  if (ctx.comm->alone()) return;
  arena_.add(&of_ranks_, {ctx.comm->size(), max_logits.size(), 1});
  arena_.allocate(ctx);
}

/// float32 holds them as they are: they were float32 where they came from (head_max.h).
void QkClip::take_maxima_of_all_ranks() {
  Comm& comm = *ctx_.comm;
  const Tensor own = of_ranks_[comm.rank()], all = max_logits_.view({max_logits_.size()});
  cast(ctx_, {.y = own.view({1, all.size()}), .x = all.view({1, all.size()})});
  std::vector<Part> parts;
  for (int rank = 0; rank < comm.size(); ++rank) parts.push_back({.tensor = of_ranks_[rank], .owner = rank});
  comm.finish(comm.start_all_gather(parts));
  head_max(ctx_, {.largest = all, .row_max = of_ranks_});
}

void QkClip::step(const Tensor& guard) {
  if (of_ranks_) take_maxima_of_all_ranks();
  for (QkClipRows& row : rows_) row.guard = guard;
  qk_clip(ctx_, rows_);
  readback_.fetch(max_logits_);
}

double QkClip::max_logit(int64_t ticket) {
  double most = -std::numeric_limits<double>::infinity();
  for (const double value : readback_.wait(ticket))
    if (value > most || std::isnan(value)) most = value;  // a NaN before stays: no comparison with it holds
  return most;
}
