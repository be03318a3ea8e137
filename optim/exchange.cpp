#include "optim/exchange.h"

#include <algorithm>
#include <iterator>

Exchange::Exchange(Context& ctx, ParameterTable& table, const Owners& owners)
    : ctx_(ctx), table_(table), owners_(owners) {
  int layers = 0;
  for (const Parameter& p : table) layers = std::max(layers, p.layer + 1);
  matrices_.resize(static_cast<size_t>(layers) + 1);
  sent_.resize(table.rows().size());
  for (size_t i = 0; i < table.rows().size(); ++i) {
    const Parameter& p = table.rows()[i];
    all_.push_back(i);
    if (!p.is_matrix())
      vectors_.push_back(i);
    else
      matrices_[static_cast<size_t>(p.layer == kOutside ? layers : p.layer)].push_back(i);
  }
}

void Exchange::add_parts(std::vector<Part>& to, size_t parameter, const Tensor& tensor) const {
  for (const Piece& piece : owners_.pieces_of(parameter))
    to.push_back({.tensor = tensor.slice(piece.first, piece.rows), .owner = piece.owner});
}

std::vector<Part> Exchange::parts(std::span<const size_t> parameters, What what) const {
  std::vector<Part> parts;
  for (const size_t i : parameters) {
    const Parameter& p = table_.rows()[i];
    if (what == What::gradients) {
      add_parts(parts, i, p.grad);
      continue;
    }
    add_parts(parts, i, p.compute);
    // Layernorms read the float32 values of their vectors.
    if (!p.is_matrix() && p.compute.data != p.value.data) add_parts(parts, i, p.value);
  }
  return parts;
}

void Exchange::allocate() {
  if (alone()) return;
  int64_t most = 0;
  const auto count = [&](std::span<const size_t> parameters) {
    int64_t bytes = 0;
    for (const Part& part : parts(parameters, What::gradients)) bytes += part.tensor.bytes();
    most = std::max(most, bytes);
  };
  for (const auto& layer : matrices_) count(layer);
  count(vectors_);
  ctx_.comm->reserve(most);
}

void Exchange::gradients_ready(int layer) {
  if (alone()) return;
  const size_t outside = matrices_.size() - 1;
  const auto start = [&](std::span<const size_t> parameters) {
    gradients_.push_back(ctx_.comm->start_reduce_scatter(parts(parameters, What::gradients)));
  };
  start(matrices_[layer == kOutside ? outside : static_cast<size_t>(layer)]);
  if (layer == kOutside) start(vectors_);
}

void Exchange::finish_gradients() {
  for (const Comm::Ticket ticket : gradients_) ctx_.comm->finish(ticket);
  gradients_.clear();
}

void Exchange::send(std::span<const size_t> parameters) {
  const auto group_of = [&](size_t i) { return layer_of(i); };
  std::vector<size_t> sorted(parameters.begin(), parameters.end());
  for (const size_t i : parameters) sent_[i] = true;
  std::ranges::stable_sort(sorted, {}, group_of);
  for (size_t begin = 0; begin < sorted.size();) {
    size_t end = begin;
    while (end < sorted.size() && group_of(sorted[end]) == group_of(sorted[begin])) ++end;
    const std::span<const size_t> group(sorted.data() + begin, end - begin);
    weights_.push_back({group_of(sorted[begin]), ctx_.comm->start_all_gather(parts(group, What::weights))});
    begin = end;
  }
}

int Exchange::layer_of(size_t parameter) const {
  const Parameter& p = table_.rows()[parameter];
  return p.is_matrix() ? p.layer : kOutside;
}

void Exchange::send_early(std::span<const size_t> parameters) {
  if (alone()) return;
  std::vector<size_t> early;
  std::ranges::copy_if(parameters, std::back_inserter(early),
                       [&](size_t i) { return layer_of(i) == kOutside; });
  send(early);
}

void Exchange::send_rest() {
  if (alone()) return;
  std::vector<size_t> rest;
  std::ranges::copy_if(all_, std::back_inserter(rest), [&](size_t i) { return !sent_[i]; });
  send(rest);
  sent_.assign(sent_.size(), false);
}

void Exchange::weights_needed(int layer) {
  std::erase_if(weights_, [&](const Pending& pending) {
    if (pending.layer != layer) return false;
    ctx_.comm->finish(pending.ticket);
    return true;
  });
}

void Exchange::finish_weights() {
  for (const Pending& pending : weights_) ctx_.comm->finish(pending.ticket);
  weights_.clear();
}

void Exchange::gather(std::span<const Tensor> whole) {
  if (alone()) return;
  finish_gradients();
  finish_weights();
  std::vector<Part> parts;
  for (const size_t i : all_) add_parts(parts, i, whole[i]);
  ctx_.comm->finish(ctx_.comm->start_all_gather(parts));
}

void Exchange::gather_gradients() {
  std::vector<Tensor> gradients;
  for (const Parameter& p : table_) gradients.push_back(p.grad);
  gather(gradients);
}

int64_t Exchange::bytes_per_step() const {
  if (alone()) return 0;
  const int others = ctx_.comm->size() - 1, rank = ctx_.comm->rank();
  int64_t bytes = 0;
  for (const Part& part : parts(all_, What::gradients))
    if (part.owner != rank) bytes += part.tensor.bytes();
  for (const Part& part : parts(all_, What::weights))
    if (part.owner == rank) bytes += others * part.tensor.bytes();
  return bytes;
}
