// Who owns what: every piece of every parameter belongs to one rank, which alone keeps its optimizer state
// (and, where products read bf16 copies, its float32 master), makes its update and hands the new weights to
// the others.
//
//   hidden matrices   whole, a piece per matrix (a fused q, k, v is three), in banks of one shape
//   embeddings, head, positions   by rows, N nearly equal ranges, under rules that treat rows apart
//                     (Rule::rows_apart); else whole
//   vectors           whole, travelling together
//
// The split balances the work of the rules, Newton-Schulz above all: T (4 n^2 m + 2 n^3) FLOPs for n =
// min(out, in), m = max(out, in) and T iterations. When the number of matrices of every cost divides by N,
// each rank takes equal chunks, one after the other, so that its batches are of as few shapes as possible.
// Otherwise the largest piece goes first, each to the rank with the least work so far (LPT: at most 4/3 of
// the best makespan, Graham 1969), lower ranks first among equals. Deterministic: every rank computes the
// same table.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "model/kernels/tensor.h"

/// What the split needs to know of one parameter.
struct OwnedParameter {
  std::string name;
  Shape shape;       // as stored
  int matrices = 1;  // stacked along the rows
  bool by_rows;      // may be cut anywhere between rows
  double work = 0;   // of one matrix, or of the whole when it is cut by rows: FLOPs of one step
};

/// Rows [first, first + rows) of a stored parameter.
struct Piece {
  size_t parameter;     // its index in the list
  int64_t first, rows;  // along the first dimension
  int owner;
  double work;
};

class Owners {
 public:
  /// Everything belongs to rank 0 of 1.
  Owners() = default;
  Owners(std::span<const OwnedParameter> parameters, int ranks);

  int ranks() const { return static_cast<int>(work_.size()); }
  /// In the order of the parameters, then of their rows; none is empty.
  std::span<const Piece> pieces() const { return pieces_; }
  /// Those of one parameter: they cover its rows.
  std::span<const Piece> pieces_of(size_t parameter) const;
  /// FLOPs of a rank's rules in one step.
  double work(int rank) const { return work_[static_cast<size_t>(rank)]; }
  /// The largest share over the mean: 1 is perfect.
  double imbalance() const;

 private:
  std::vector<Piece> pieces_;
  std::vector<size_t> first_piece_;  // of each parameter, and one past the end
  std::vector<double> work_ = {0};
};
