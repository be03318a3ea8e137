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
void on_one_thread(Context& ctx);

/// A tensor of state, or of all its pieces put together.
struct Whole {
  Shape shape;
  std::vector<std::byte> bytes;
  int64_t rows = 0;  // put in so far
  bool operator==(const Whole&) const = default;
};
using State = std::map<std::string, Whole>;

/// Puts a piece of state, or a whole tensor, where it belongs.
void put(State& state, const NamedTensor& tensor);

/// Fills the pieces that lie here.
void take(std::span<const NamedTensor> tensors, const State& state);

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
  void hide_others();
  /// The owners' weights, or directions, on all ranks.
  void gather(Tensor Parameter::*tensor);
  StepReport step(int64_t t);
  /// The state of all ranks, on one of them: each brings its pieces.
  State whole_state();
};

Trace run(RankModel& model, int64_t first, int64_t end);

Trace alone(const OptimizerOptions& options, int64_t steps = kSteps);

/// Every rank's trace. No rank may fail.
std::vector<Trace> together(const OptimizerOptions& options, int ranks, int64_t steps = kSteps);

/// The largest difference over the largest number.
double difference(const std::vector<float>& a, const std::vector<float>& b);

std::vector<float> floats_of(const Whole& whole);

/// `tolerance` 0: the same bits.
void expect_same(const Trace& got, const Trace& want, double tolerance);

/// All numbers of ranks of the same bits, and those of one process.
void check_ranks(const OptimizerOptions& options, double tolerance, std::span<const int> worlds = kRanks);
