// Hyperball: a weight keeps the Frobenius norm that it began with, R = ||W_0||_F, and moves over that sphere:
//
//   W <- R y / ||y||_F,   y = W - lr R u / ||u||_F
//
// As a rule's direction u is replaced by (W - W') / lr, with W' the new weight, so that the update that all
// rules share, W <- W - lr u, lands on the sphere. A key of every rule (hyperball=1), as in MuonH and AdamH.
// A zero u leaves W where it is. A weight that begins at zero would stay there: the optimizer refuses it.
#pragma once

#include <span>

#include "optim/rule.h"

/// Scratch of hyperball() for blocks of this shape and dtype.
int64_t hyperball_scratch_bytes(const Group& group);
/// Replaces the directions in grad. `lr` is what the direction will be multiplied by; 0 leaves it alone. R is
/// the last state of every block, set when `first`. Where step.grad_scale is NaN, R is meaningless and the
/// update is skipped anyway. Only enqueues work.
void hyperball(Context& ctx, std::span<const Block> blocks, double lr, bool first);
