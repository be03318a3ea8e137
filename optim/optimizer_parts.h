// The parts of an optimizer, for its own files alone.
#pragma once

#include <vector>

#include "optim/optimizer.h"

struct Optimizer::Shard {
  Piece piece;
  std::vector<StateSpec> specs;    // per block
  std::vector<Tensor> state;       // the blocks' states stacked; without data where another rank keeps it
  std::vector<Tensor> aside = {};  // copies of them, where measures_first()
  Tensor anchor = {};              // the weight before the first step, for an escape velocity
  Tensor lengths = {};  // of its blocks' gradients, one after the other, where the rule asks for them
  size_t batch = 0;     // where its blocks are
};

/// The same on all ranks, in the same order, but for the blocks.
struct Optimizer::Batch {
  const Rule* rule;
  double sensitivity;
  Shape block;                          // of the parameters' matrices
  Group group;                          // of this rank's pieces; without blocks where it owns none
  std::vector<size_t> parameters = {};  // indices into the table
  bool applied = false;                 // the last step's direction() has moved the weights
};
