// Who owns what: every piece of every parameter belongs to one rank, which alone keeps its optimizer state
// (and, where products read bf16 copies, its float32 master), makes its update and hands the new weights to
// the others.
//
//   hidden matrices   whole (a fused q, k, v is three)
//   embeddings, head, positions   by rows, N nearly equal ranges, under rules that treat rows apart
//                     (Rule::rows_apart); else whole
//   vectors           whole, each to the rank with the least work
//
// The split balances the work of the rules, Newton-Schulz above all: T (4 n^2 m + 2 n^3) FLOPs for n =
// min(out, in), m = max(out, in) and T iterations. When the number of matrices of every cost divides by N,
// each rank takes equal chunks of them, one after the other, those of one shape together, so that its batches
// are of as few shapes as possible. Otherwise the largest goes first, each to the rank with the least work so
// far (LPT: at most 4/3 of the best makespan, Graham 1969), lower ranks first among equals. Deterministic:
// every rank computes the same table.
//
// GPT-2 124M under muon, 8 ranks: 6 C x C matrices and 3 of the MLP each, on ranks 0 to 3 all (4 C, C), on 4
// to 7 all (C, 4 C): 203.8 GFLOP each. With one rank every parameter is one piece.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "model/kernels/tensor.h"

/// What the split needs to know of one parameter.
struct OwnedParameter {
  std::string name;
  Shape shape;       // as stored: (rows, cols), or a vector (n)
  int matrices = 1;  // stacked along the rows
  bool by_rows;      // one matrix that may be cut anywhere between rows
  double work = 0;   // of one matrix, or of the whole when it is cut by rows: FLOPs of one step
};

/// Rows [first, first + rows) of a stored parameter that belong to one rank: neighbours of the same owner are
/// one piece.
struct Piece {
  size_t parameter;     // its index in the list
  int64_t first, rows;  // along the first dimension
  int matrices;         // whole ones, one below the other; 1 for rows of a larger one, and for a vector
  int owner;
  double work;  // FLOPs of one step
};

class Owners {
 public:
  /// One rank, and nothing to own.
  Owners() = default;
  /// Throws ShapeError for no ranks, or for rows that do not divide into the matrices.
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
  void add_row_ranges(size_t parameter, const OwnedParameter& p);
  void give(Piece& piece, int rank);
  int least_busy() const;
  void merge_neighbours(std::span<const OwnedParameter> parameters);

  std::vector<Piece> pieces_;
  std::vector<size_t> first_piece_ = {0};  // of each parameter, and one past the end
  std::vector<double> work_ = {0};
};
