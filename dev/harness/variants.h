// Candidates: other implementations of an operation, under the operation's own signature, that the harness
// checks and times beside the one that the door calls ("shipped"). A candidate lives in dev/lab/ and has one
// line in variants.cpp; when it wins it moves into model/kernels/, when it loses it goes.
#pragma once

#include <string>
#include <variant>
#include <vector>

#include "tests/cases/all.h"

/// A candidate for any of the operations.
using AnyOp = std::variant<Op<GeluForward>, Op<GeluBackward>, Op<LayernormForward>, Op<LayernormBackward>,
                           Op<EmbeddingForward>, Op<EmbeddingBackward>, Op<CrossEntropy>, Op<Matmul>,
                           Op<BatchedMatmul>, Op<BiasBackward>, Op<AttentionForward>, Op<AttentionBackward>>;

struct Variant {
  std::string op;    // "matmul"
  std::string name;  // "wgmma"
  Where where;       // the device that it runs on
  AnyOp function;
};

/// All there are. "reference" is plain loops that accumulate in float64: what large cases are checked
/// against.
std::vector<Variant> all_variants();
