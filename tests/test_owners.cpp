// Who owns what: every row has one owner, equal chunks where they fit, LPT where they do not.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "optim/owners.h"

namespace {
/// Newton-Schulz with five quintic steps.
double newton_schulz(int64_t rows, int64_t cols) {
  const auto n = static_cast<double>(std::min(rows, cols)), m = static_cast<double>(std::max(rows, cols));
  return 5 * (4 * n * n * m + 2 * n * n * n);
}

/// GPT-2 with L layers and C channels: embeddings by rows, hidden matrices whole, vectors.
std::vector<OwnedParameter> gpt2(int64_t L, int64_t C, int64_t V = 50257, int64_t positions = 1024) {
  std::vector<OwnedParameter> list;
  const auto rows = [&](const char* name, int64_t count) {
    list.push_back(
        {.name = name, .shape = {count, C}, .by_rows = true, .work = 20 * static_cast<double>(count * C)});
  };
  const auto matrix = [&](const std::string& name, int64_t out, int64_t in, int matrices = 1) {
    list.push_back({.name = name,
                    .shape = {out, in},
                    .matrices = matrices,
                    .by_rows = false,
                    .work = newton_schulz(out / matrices, in)});
    list.push_back(
        {.name = name + ".bias", .shape = {out}, .by_rows = false, .work = 20 * static_cast<double>(out)});
  };
  rows("wte", V);
  rows("wpe", positions);
  for (int64_t l = 0; l < L; ++l) {
    const std::string layer = "h." + std::to_string(l);
    matrix(layer + ".c_attn", 3 * C, C, 3);
    matrix(layer + ".attn.c_proj", C, C);
    matrix(layer + ".c_fc", 4 * C, C);
    matrix(layer + ".mlp.c_proj", C, 4 * C);
  }
  return list;
}

/// Everything that holds for every split.
void check_split(const std::vector<OwnedParameter>& list, const Owners& owners, int ranks) {
  ASSERT_EQ(owners.ranks(), ranks);
  std::vector<double> work(static_cast<size_t>(ranks));
  size_t next = 0;
  for (size_t i = 0; i < list.size(); ++i) {
    const OwnedParameter& p = list[i];
    int64_t row = 0, fewest = p.shape[0], most = 0;
    int matrices = 0, owner = -1;
    for (const Piece& piece : owners.pieces_of(i)) {
      ASSERT_LT(next, owners.pieces().size());
      EXPECT_EQ(&piece, &owners.pieces()[next++]) << "in the order of the parameters";
      EXPECT_EQ(piece.parameter, i);
      EXPECT_EQ(piece.first, row) << p.name;
      ASSERT_GT(piece.rows, 0) << p.name;
      ASSERT_TRUE(piece.owner >= 0 && piece.owner < ranks);
      EXPECT_NE(piece.owner, owner) << "neighbours of one owner are one piece";
      owner = piece.owner;
      row += piece.rows;
      matrices += piece.matrices;
      fewest = std::min(fewest, piece.rows), most = std::max(most, piece.rows);
      work[static_cast<size_t>(piece.owner)] += piece.work;
      if (!p.by_rows) {
        EXPECT_EQ(piece.rows * p.matrices, piece.matrices * p.shape[0]) << p.name;
        EXPECT_DOUBLE_EQ(piece.work, piece.matrices * p.work);
      }
    }
    EXPECT_EQ(row, p.shape[0]) << p.name << " is covered";
    if (!p.by_rows) {
      EXPECT_EQ(matrices, p.matrices);
      continue;
    }
    EXPECT_LE(most - fewest, 1) << p.name;
    EXPECT_EQ(std::ssize(owners.pieces_of(i)), std::min<int64_t>(ranks, p.shape[0])) << p.name;
  }
  EXPECT_EQ(next, owners.pieces().size());
  for (int r = 0; r < ranks; ++r)
    EXPECT_NEAR(owners.work(r), work[static_cast<size_t>(r)], 1e-12 * owners.work(r));
  const double mean = std::accumulate(work.begin(), work.end(), 0.0) / ranks;
  EXPECT_NEAR(owners.imbalance(), *std::ranges::max_element(work) / mean, 1e-12);
}

/// The best that any split of whole works can do, by trying all.
double best_makespan(const std::vector<double>& works, std::vector<double>& loads, size_t i = 0) {
  if (i == works.size()) return *std::ranges::max_element(loads);
  double best = 1e300;
  for (double& load : loads) {
    load += works[i];
    best = std::min(best, best_makespan(works, loads, i + 1));
    load -= works[i];
  }
  return best;
}
}  // namespace

TEST(Owners, Gpt2OverEightRanksIsPerfectlyEqual) {
  const auto list = gpt2(12, 768);
  const Owners owners(list, 8);
  check_split(list, owners, 8);
  std::vector<double> matrices(8);
  std::vector<int> square(8), wide(8), tall(8);
  for (const Piece& piece : owners.pieces()) {
    const OwnedParameter& p = list[piece.parameter];
    if (p.by_rows || p.shape.rank() != 2) continue;
    const auto r = static_cast<size_t>(piece.owner);
    matrices[r] += piece.work;
    const int64_t rows = p.shape[0] / p.matrices;
    (rows == p.shape[1] ? square : rows > p.shape[1] ? tall : wide)[r] += piece.matrices;
  }
  for (size_t r = 0; r < 8; ++r) {
    EXPECT_EQ(matrices[r], matrices[0]);
    EXPECT_NEAR(matrices[r] / 1e9, 203.8, 0.05);
    EXPECT_EQ(square[r], 6);
    EXPECT_EQ(tall[r], r < 4 ? 3 : 0);
    EXPECT_EQ(wide[r], r < 4 ? 0 : 3);
  }
  EXPECT_LT(owners.imbalance(), 1 + 1e-5);  // the vectors are what is left
}

TEST(Owners, ChunksAreContiguousWhereEveryCostDivides) {
  const auto list = gpt2(12, 768);
  for (const int ranks : {2, 3, 4, 6, 8, 12, 24}) {
    const Owners owners(list, ranks);
    check_split(list, owners, ranks);
    for (const bool mlp_in : {false, true}) {  // c_fc and the C x C matrices appear in the order of the table
      int before = 0;
      for (const Piece& piece : owners.pieces()) {
        const OwnedParameter& p = list[piece.parameter];
        if (p.by_rows || p.shape.rank() != 2 || p.shape[1] != 768) continue;
        if ((p.shape[0] == 4 * 768) != mlp_in) continue;
        EXPECT_GE(piece.owner, before) << p.name << ", " << ranks;
        before = piece.owner;
      }
    }
  }
}

TEST(Owners, AnyNumberOfRanks) {
  for (const auto& list : {gpt2(12, 768), gpt2(1, 16, 37, 24), gpt2(5, 40, 3, 1)})
    for (int ranks = 1; ranks <= 64; ++ranks) {
      SCOPED_TRACE(ranks);
      const Owners owners(list, ranks);
      check_split(list, owners, ranks);
      if (ranks == 1) {
        EXPECT_EQ(owners.pieces().size(), list.size()) << "every parameter is one piece";
      }
      double largest = 0, mean = 0, most = 0;
      for (const OwnedParameter& p : list) largest = std::max(largest, p.work);
      for (int r = 0; r < ranks; ++r) mean += owners.work(r) / ranks, most = std::max(most, owners.work(r));
      EXPECT_LE(most, mean + largest);
    }
}

TEST(Owners, RanksWithoutWork) {
  const std::vector<OwnedParameter> list = {{.name = "a", .shape = {4, 4}, .by_rows = false, .work = 1},
                                            {.name = "b", .shape = {2, 4}, .by_rows = true, .work = 2}};
  const Owners owners(list, 5);
  check_split(list, owners, 5);
  EXPECT_EQ(owners.pieces().size(), 3u);
  EXPECT_EQ(owners.pieces_of(0)[0].owner, 2);  // the first that has no rows of b
  EXPECT_EQ(owners.work(3), 0);
  EXPECT_DOUBLE_EQ(owners.imbalance(), 5.0 / 3);
}

TEST(Owners, LargestFirstKeepsItsBound) {  // Graham 1969: (4/3 - 1/(3N)) of the best makespan
  std::mt19937 random(5);
  double worst = 1;
  for (int trial = 0; trial < 60; ++trial) {
    const int ranks = 2 + trial % 3;
    std::vector<OwnedParameter> list;
    std::vector<double> works;
    for (int i = 0; i < 8; ++i) {
      works.push_back(1 + random() % 20);
      list.push_back({.name = "m", .shape = {4, 4}, .by_rows = false, .work = works.back()});
    }
    list.push_back({.name = "odd", .shape = {4, 4}, .by_rows = false, .work = 21});  // one of its cost
    works.push_back(21);
    const Owners owners(list, ranks);
    check_split(list, owners, ranks);
    std::vector<double> loads(static_cast<size_t>(ranks));
    const double best = best_makespan(works, loads);
    double most = 0;
    for (int r = 0; r < ranks; ++r) most = std::max(most, owners.work(r));
    EXPECT_LE(most, (4.0 / 3 - 1.0 / (3 * ranks)) * best + 1e-9);
    worst = std::max(worst, most / best);
  }
  EXPECT_GT(worst, 1);  // some of these are hard
}

TEST(Owners, Deterministic) {
  const auto list = gpt2(7, 32, 101, 50);
  for (const int ranks : {3, 5, 16}) {
    const Owners a(list, ranks), b(list, ranks);
    ASSERT_EQ(a.pieces().size(), b.pieces().size());
    for (size_t i = 0; i < a.pieces().size(); ++i) {
      EXPECT_EQ(a.pieces()[i].owner, b.pieces()[i].owner);
      EXPECT_EQ(a.pieces()[i].first, b.pieces()[i].first);
    }
  }
}

TEST(Owners, RefusesWhatCannotBe) {
  const OwnedParameter fused{.name = "f", .shape = {7, 4}, .matrices = 3, .by_rows = false, .work = 1};
  EXPECT_THROW(Owners({&fused, 1}, 2), ShapeError);
  const OwnedParameter cut{.name = "c", .shape = {6, 4}, .matrices = 3, .by_rows = true, .work = 1};
  EXPECT_THROW(Owners({&cut, 1}, 2), ShapeError);
  EXPECT_THROW(Owners({}, 0), ShapeError);
  EXPECT_EQ(Owners({}, 3).imbalance(), 1);
}
