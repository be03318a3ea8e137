// An optimizer on several ranks, threads of one process, beside the one of a single process.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <map>

#include "tests/optim_fixture.h"
#include "tests/rank_threads.h"

inline constexpr int64_t kSteps = 4;
inline constexpr int kRanks[] = {1, 2, 3, 4, 8};

/// One thread per rank, so that products are cut up the same way everywhere.
inline void on_one_thread(Context& ctx) {
  use_cpu(ctx, 1);
}

/// A tensor of state, or of all its pieces put together.
struct Whole {
  Shape shape;
  std::vector<std::byte> bytes;
  int64_t rows = 0;  // put in so far
  bool operator==(const Whole&) const = default;
};
using State = std::map<std::string, Whole>;

/// Puts a piece of state, or a whole tensor, where it belongs.
inline void put(State& state, const NamedTensor& tensor) {
  const Tensor& value = tensor.value;
  Whole& whole = state[tensor.name];
  const int64_t rows = tensor.all_rows < 0 ? value.shape[0] : tensor.all_rows;
  const int64_t row_bytes = value.bytes() / value.shape[0];
  expect(tensor.first_row >= 0 && tensor.first_row + value.shape[0] <= rows, "a piece leaves its tensor");
  whole.shape = value.shape.rank() == 2 ? Shape{rows, value.shape[1]} : Shape{rows};
  whole.bytes.resize(static_cast<size_t>(rows * row_bytes));
  std::memcpy(whole.bytes.data() + tensor.first_row * row_bytes, value.data,
              static_cast<size_t>(value.bytes()));
  whole.rows += value.shape[0];
}

/// Fills the pieces that lie here.
inline void take(std::span<const NamedTensor> tensors, const State& state) {
  for (const NamedTensor& tensor : tensors) {
    if (!tensor.value) continue;
    const Whole& whole = state.at(tensor.name);
    const int64_t row_bytes = tensor.value.bytes() / tensor.value.shape[0];
    std::memcpy(tensor.value.data, whole.bytes.data() + tensor.first_row * row_bytes,
                static_cast<size_t>(tensor.value.bytes()));
  }
}

/// What a run of some steps left behind.
struct Trace {
  std::vector<std::vector<float>> weights;  // after each step
  std::vector<StepReport> reports;
  State state;  // after the last
};

/// A model on one of several ranks, whose gradients are complete only at their owners.
struct RankModel : SmallModel {
  RankModel(const OptimizerOptions& options, const std::shared_ptr<Comm>& comm)
      : SmallModel(options, on_one_thread, 16, comm) {}

  bool mine(const Piece& piece) { return piece.owner == ctx.comm->rank(); }
  Tensor rows(const Tensor& whole, const Piece& piece) { return whole.slice(piece.first, piece.rows); }
  Parameter& parameter(const Piece& piece) { return table.rows()[piece.parameter]; }

  /// Nobody may look at the gradients that others own.
  void hide_others() {
    for (const Piece& piece : optimizer.owners().pieces())
      if (!mine(piece)) std::ranges::fill(rows(parameter(piece).grad, piece).floats(), std::nanf(""));
  }
  /// The owners' weights, or directions, on all ranks.
  void gather(Tensor Parameter::*tensor) {
    std::vector<Part> parts;
    for (const Piece& piece : optimizer.owners().pieces())
      parts.push_back({rows(parameter(piece).*tensor, piece), piece.owner});
    ctx.comm->finish(ctx.comm->start_all_gather(parts));
  }
  StepReport step(int64_t t) {
    set_gradients(t);
    hide_others();
    optimizer.step(t, 20);
    gather(&Parameter::value);
    return optimizer.report();
  }
  /// The state of all ranks, on one of them: each brings its pieces.
  State whole_state() {
    State state;
    for (const NamedTensor& tensor : optimizer.state()) {
      std::vector<std::byte> bytes(static_cast<size_t>(tensor.value.bytes()));
      if (tensor.value) std::memcpy(bytes.data(), tensor.value.data, bytes.size());
      // A sum of what one rank has and the others have not; exact, and -0 is 0.
      NamedTensor here = tensor;
      here.value.data = bytes.data();
      if (tensor.name != "escape_velocity") ctx.comm->finish(ctx.comm->start_sum(std::span(&here.value, 1)));
      put(state, here);
    }
    return state;
  }
};

inline Trace run(RankModel& model, int64_t first, int64_t end) {
  Trace trace;
  for (int64_t t = first; t < end; ++t) {
    trace.reports.push_back(model.step(t));
    trace.weights.push_back(model.weights());
  }
  trace.state = model.whole_state();
  return trace;
}

inline Trace alone(const OptimizerOptions& options, int64_t steps = kSteps) {
  RankModel model(options, std::make_shared<Comm>());
  return run(model, 0, steps);
}

/// Every rank's trace. No rank may fail.
inline std::vector<Trace> together(const OptimizerOptions& options, int ranks, int64_t steps = kSteps) {
  std::vector<Trace> traces(static_cast<size_t>(ranks));
  const auto failures = on_ranks(ranks, [&](const std::shared_ptr<Comm>& comm) {
    RankModel model(options, comm);
    traces[static_cast<size_t>(comm->rank())] = run(model, 0, steps);
  });
  for (const std::string& failure : failures) EXPECT_EQ(failure, "");
  return traces;
}

/// The largest difference over the largest number.
inline double difference(const std::vector<float>& a, const std::vector<float>& b) {
  Matrix x(1, std::ssize(a)), y(1, std::ssize(b));
  x.data = a, y.data = b;
  return a.size() == b.size() ? deviation(x, y) : 1e30;
}

inline std::vector<float> floats_of(const Whole& whole) {
  std::vector<float> values(whole.bytes.size() / 4);
  std::memcpy(values.data(), whole.bytes.data(), whole.bytes.size());
  return values;
}

/// `tolerance` 0: the same bits.
inline void expect_same(const Trace& got, const Trace& want, double tolerance) {
  ASSERT_EQ(got.weights.size(), want.weights.size());
  for (size_t t = 0; t < want.weights.size(); ++t) {
    if (tolerance == 0)
      EXPECT_EQ(got.weights[t], want.weights[t]) << "step " << t;
    else
      EXPECT_LE(difference(got.weights[t], want.weights[t]), tolerance) << "step " << t;
    const StepReport &a = got.reports[t], &b = want.reports[t];
    EXPECT_NEAR(a.grad_norm / b.grad_norm, 1, 1e-12);
    EXPECT_NEAR(a.clip_scale / b.clip_scale, 1, 1e-12);
    EXPECT_LE(std::fabs(a.lr - b.lr), (tolerance + 1e-12) * b.lr);
    EXPECT_LE(std::fabs(a.eta - b.eta), (tolerance + 1e-12) * b.eta);
  }
  ASSERT_EQ(got.state.size(), want.state.size());
  for (const auto& [name, whole] : want.state) {
    ASSERT_TRUE(got.state.contains(name)) << name;
    const Whole& other = got.state.at(name);
    EXPECT_EQ(other.shape, whole.shape) << name;
    EXPECT_EQ(other.rows, whole.shape[0]) << name << ": every row once";
    if (name == "escape_velocity") continue;  // f64, and reports have it
    if (tolerance == 0)
      EXPECT_EQ(floats_of(other), floats_of(whole)) << name;
    else
      EXPECT_LE(difference(floats_of(other), floats_of(whole)), 10 * tolerance) << name;  // squares, too
  }
}

/// All numbers of ranks of the same bits, and those of one process.
inline void check_ranks(const OptimizerOptions& options, double tolerance,
                        std::span<const int> worlds = kRanks) {
  SCOPED_TRACE(options.rules.at(Role::hidden) + ", " + options.rules.at(Role::embedding));
  const Trace want = alone(options);
  for (const int ranks : worlds) {
    SCOPED_TRACE(std::to_string(ranks) + " ranks");
    const std::vector<Trace> traces = together(options, ranks);
    expect_same(traces[0], want, tolerance);
    for (const Trace& trace : traces) {
      EXPECT_EQ(trace.weights, traces[0].weights);
      EXPECT_EQ(trace.state, traces[0].state);
    }
  }
}
