#include "tests/sharded_fixture.h"

#include <gtest/gtest.h>

void on_one_thread(Context& ctx) {
  use_cpu(ctx, 1);
}

void put(State& state, const NamedTensor& tensor) {
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

void take(std::span<const NamedTensor> tensors, const State& state) {
  for (const NamedTensor& tensor : tensors) {
    if (!tensor.value) continue;
    const Whole& whole = state.at(tensor.name);
    const int64_t row_bytes = tensor.value.bytes() / tensor.value.shape[0];
    std::memcpy(tensor.value.data, whole.bytes.data() + tensor.first_row * row_bytes,
                static_cast<size_t>(tensor.value.bytes()));
  }
}

Trace run(RankModel& model, int64_t first, int64_t end) {
  Trace trace;
  for (int64_t t = first; t < end; ++t) {
    trace.reports.push_back(model.step(t));
    trace.weights.push_back(model.weights());
  }
  trace.state = model.whole_state();
  return trace;
}

Trace alone(const OptimizerOptions& options, int64_t steps) {
  RankModel model(options, std::make_shared<Comm>());
  return run(model, 0, steps);
}

std::vector<Trace> together(const OptimizerOptions& options, int ranks, int64_t steps) {
  std::vector<Trace> traces(static_cast<size_t>(ranks));
  const auto failures = on_ranks(ranks, [&](const std::shared_ptr<Comm>& comm) {
    RankModel model(options, comm);
    traces[static_cast<size_t>(comm->rank())] = run(model, 0, steps);
  });
  for (const std::string& failure : failures) EXPECT_EQ(failure, "");
  return traces;
}

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  Matrix x(1, std::ssize(a)), y(1, std::ssize(b));
  x.data = a, y.data = b;
  return a.size() == b.size() ? deviation(x, y) : 1e30;
}

std::vector<float> floats_of(const Whole& whole) {
  std::vector<float> values(whole.bytes.size() / 4);
  std::memcpy(values.data(), whole.bytes.data(), whole.bytes.size());
  return values;
}

void expect_same(const Trace& got, const Trace& want, double tolerance) {
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

void check_ranks(const OptimizerOptions& options, double tolerance, std::span<const int> worlds) {
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

void RankModel::hide_others() {
  for (const Piece& piece : optimizer.owners().pieces())
    if (!mine(piece)) std::ranges::fill(rows(parameter(piece).grad, piece).floats(), std::nanf(""));
}

void RankModel::gather(Tensor Parameter::*tensor) {
  std::vector<Part> parts;
  for (const Piece& piece : optimizer.owners().pieces())
    parts.push_back({rows(parameter(piece).*tensor, piece), piece.owner});
  ctx.comm->finish(ctx.comm->start_all_gather(parts));
}

StepReport RankModel::step(int64_t t) {
  set_gradients(t);
  hide_others();
  optimizer.step(t, 20);
  gather(&Parameter::value);
  return optimizer.report();
}

State RankModel::whole_state() {
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
