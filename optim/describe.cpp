#include "optim/describe.h"

#include <fmt/format.h>

#include <set>

namespace {
/// "0", "2-4", "0-1, 5"
std::string ranges_text(const std::set<int>& ranks) {
  std::string text;
  for (auto it = ranks.begin(); it != ranks.end();) {
    const int first = *it;
    int last = first;
    while (++it != ranks.end() && *it == last + 1) last = *it;
    text += fmt::format("{}{}", text.empty() ? "" : ", ", first);
    if (last > first) text += fmt::format("-{}", last);
  }
  return text;
}

std::string owners_text(std::span<const Piece> pieces, int64_t matrices) {
  std::set<int> ranks;
  int64_t blocks = 0;
  for (const Piece& piece : pieces) ranks.insert(piece.owner), blocks += piece.matrices;
  return ranges_text(ranks) + (blocks > matrices ? " by rows" : "");
}
}  // namespace

std::vector<RowInfo> describe_rows(const Assignment& assignment, const Owners& owners) {
  std::vector<RowInfo> infos;
  for (const AssignedRule& row : assignment.rows) {
    const Parameter& p = *row.parameter;
    const std::span<const Piece> pieces = owners.pieces_of(infos.size());
    int64_t state_bytes = 0;
    for (const Piece& piece : pieces) state_bytes += state_bytes_of(row, piece);
    infos.push_back({.parameter = p.name,
                     .role = p.role,
                     .rule = row.text,
                     .norm = row.rule->describe(),
                     .by = row.by,
                     .matrices = p.matrices,
                     .lr = row.rule->lr(),
                     .weight_decay = row.rule->weight_decay(),
                     .sensitivity = row.sensitivity,
                     .state_bytes = state_bytes,
                     .owners = owners_text(pieces, p.matrices)});
  }
  return infos;
}

std::vector<RankInfo> describe_ranks(const Assignment& assignment, const Owners& owners) {
  std::vector<RankInfo> infos(static_cast<size_t>(owners.ranks()));
  for (const Piece& piece : owners.pieces()) {
    const AssignedRule& row = assignment.rows[piece.parameter];
    const Shape& shape = row.parameter->shape;
    RankInfo& info = infos[static_cast<size_t>(piece.owner)];
    ++info.pieces;
    info.parameters += piece.rows * (shape.size() / shape[0]);
    info.state_bytes += state_bytes_of(row, piece);
    if (assignment.measures_first && owners.ranks() > 1) info.aside_bytes = info.state_bytes;
    info.work += piece.work;
  }
  return infos;
}

std::string ranks_table(std::span<const RankInfo> ranks, double imbalance) {
  std::string text = fmt::format("{:>5} {:>7} {:>14} {:>12} {:>14}\n", "rank", "pieces", "parameters",
                                 "state MiB", "GFLOP a step");
  for (size_t r = 0; r < ranks.size(); ++r) {
    const RankInfo& info = ranks[r];
    text += fmt::format("{:>5} {:>7} {:>14} {:>12.1f} {:>14.4g}\n", r, info.pieces, info.parameters,
                        static_cast<double>(info.state_bytes) / (1024.0 * 1024.0), info.work / 1e9);
  }
  return text + fmt::format("the busiest rank has {:.3f} of the mean work\n", imbalance);
}
