// What an optimizer will do, for people: how every tensor is updated and by which ranks, and what falls to
// every rank.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "optim/assign.h"

/// How one parameter is updated, for `info`.
struct RowInfo {
  std::string parameter;
  Role role;
  std::string rule;  // what the user wrote, "muon:lr=0.02"
  std::string norm;  // "rms-rms"
  std::string by;    // what gave it the rule: "hidden", or the pattern
  int matrices;      // that the rule sees
  double lr;
  double weight_decay;
  double sensitivity;
  int64_t state_bytes;  // on all ranks together
  std::string owners;   // "0", "2-4", "0-7 by rows"
};
std::vector<RowInfo> describe_rows(const Assignment& assignment, const Owners& owners);

/// What one rank owns.
struct RankInfo {
  int pieces = 0;          // tensors, or parts of them
  int64_t parameters = 0;  // numbers
  int64_t state_bytes = 0;
  int64_t aside_bytes = 0;  // the copy of it that Assignment::measures_first takes
  double work = 0;          // FLOPs of its rules in one step
};
std::vector<RankInfo> describe_ranks(const Assignment& assignment, const Owners& owners);
/// A table with one line per rank, and the imbalance (Owners::imbalance()) below it.
std::string ranks_table(std::span<const RankInfo> ranks, double imbalance);
