#include "optim/owners.h"

#include <algorithm>
#include <map>
#include <numeric>

namespace {
/// A matrix or vector that is owned whole, as a piece that nobody owns yet, and how it is compared.
struct Whole {
  Piece piece;
  Shape shape;  // of the matrix
};

std::vector<Whole> matrices_of(size_t parameter, const OwnedParameter& p) {
  expect(p.matrices >= 1 && p.shape[0] % p.matrices == 0,
         "owners: a fused parameter's rows must divide into its matrices");
  const int64_t rows = p.shape[0] / p.matrices;
  const Shape shape = p.shape.rank() == 2 ? Shape{rows, p.shape[1]} : Shape{rows};
  std::vector<Whole> list;
  for (int i = 0; i < p.matrices; ++i)
    list.push_back({.piece = {.parameter = parameter,
                              .first = i * rows,
                              .rows = rows,
                              .matrices = 1,
                              .owner = 0,
                              .work = p.work},
                    .shape = shape});
  return list;
}

/// Matrices of one cost, those of one shape next to each other, else in the order of the table.
using CostClass = std::vector<Piece*>;

std::vector<CostClass> cost_classes(std::vector<Whole>& matrices) {
  std::vector<double> costs;  // in the order of appearance, as the shapes
  std::vector<Shape> shapes;
  const auto index = [](auto& list, const auto& value) {
    const auto at = std::ranges::find(list, value) - list.begin();
    if (at == std::ssize(list)) list.push_back(value);
    return static_cast<size_t>(at);
  };
  std::map<std::pair<size_t, size_t>, CostClass> sorted;  // by cost, then shape
  for (Whole& m : matrices) sorted[{index(costs, m.piece.work), index(shapes, m.shape)}].push_back(&m.piece);
  std::vector<CostClass> classes(costs.size());
  for (const auto& [key, list] : sorted)
    classes[key.first].insert(classes[key.first].end(), list.begin(), list.end());
  return classes;
}
}  // namespace

Owners::Owners(std::span<const OwnedParameter> parameters, int ranks) {
  expect(ranks >= 1, "owners: need at least one rank");
  work_.assign(static_cast<size_t>(ranks), 0);
  std::vector<Whole> matrices, vectors;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const OwnedParameter& p = parameters[i];
    if (p.by_rows) {
      add_row_ranges(i, p);
      continue;
    }
    auto& list = p.shape.rank() == 2 ? matrices : vectors;
    std::ranges::copy(matrices_of(i, p), std::back_inserter(list));
  }
  const std::vector<CostClass> classes = cost_classes(matrices);
  std::vector<Piece*> one_by_one;
  for (Whole& v : vectors) one_by_one.push_back(&v.piece);
  const auto divides = [&](const CostClass& c) { return c.size() % work_.size() == 0; };
  if (std::ranges::all_of(classes, divides)) {
    for (const CostClass& c : classes)
      for (size_t i = 0; i < c.size(); ++i) give(*c[i], static_cast<int>(i / (c.size() / work_.size())));
  } else {
    for (const CostClass& c : classes) std::ranges::copy(c, std::back_inserter(one_by_one));
  }
  std::ranges::stable_sort(one_by_one, [](const Piece* a, const Piece* b) { return a->work > b->work; });
  for (Piece* piece : one_by_one) give(*piece, least_busy());
  for (const auto* list : {&matrices, &vectors})
    for (const Whole& whole : *list) pieces_.push_back(whole.piece);
  merge_neighbours(parameters);
}

/// The first ranks take one row more where the rows do not divide.
void Owners::add_row_ranges(size_t parameter, const OwnedParameter& p) {
  expect(p.matrices == 1 && p.shape.rank() == 2, "owners: only a single matrix is cut by rows");
  const int64_t all = p.shape[0], each = all / ranks(), left = all % ranks();
  int64_t first = 0;
  for (int rank = 0; rank < ranks(); ++rank) {
    const int64_t rows = each + (rank < left ? 1 : 0);
    if (rows == 0) return;
    Piece piece{.parameter = parameter,
                .first = first,
                .rows = rows,
                .matrices = 1,
                .owner = rank,
                .work = p.work * static_cast<double>(rows) / static_cast<double>(all)};
    give(piece, rank);
    pieces_.push_back(piece);
    first += rows;
  }
}

void Owners::give(Piece& piece, int rank) {
  piece.owner = rank;
  work_[static_cast<size_t>(rank)] += piece.work;
}

int Owners::least_busy() const {
  return static_cast<int>(std::ranges::min_element(work_) - work_.begin());
}

void Owners::merge_neighbours(std::span<const OwnedParameter> parameters) {
  std::ranges::sort(pieces_, [](const Piece& a, const Piece& b) {
    return std::pair(a.parameter, a.first) < std::pair(b.parameter, b.first);
  });
  std::vector<Piece> merged;
  first_piece_.assign(parameters.size() + 1, 0);
  for (const Piece& piece : pieces_) {
    if (!merged.empty() && merged.back().parameter == piece.parameter && merged.back().owner == piece.owner) {
      Piece& last = merged.back();
      last.rows += piece.rows, last.matrices += piece.matrices, last.work += piece.work;
      continue;
    }
    merged.push_back(piece);
    ++first_piece_[piece.parameter + 1];
  }
  std::partial_sum(first_piece_.begin(), first_piece_.end(), first_piece_.begin());
  pieces_ = std::move(merged);
}

std::span<const Piece> Owners::pieces_of(size_t parameter) const {
  const size_t first = first_piece_.at(parameter), end = first_piece_.at(parameter + 1);
  return std::span(pieces_).subspan(first, end - first);
}

double Owners::imbalance() const {
  const double sum = std::accumulate(work_.begin(), work_.end(), 0.0);
  return sum > 0 ? *std::ranges::max_element(work_) * ranks() / sum : 1;
}
