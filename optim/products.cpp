#include "optim/products.h"

#include <algorithm>

#include "model/kernels/matmul.h"

namespace {
Tensor first_of(std::span<const Tensor> matrices, size_t count) {
  const Shape& shape = matrices[0].shape;
  return {matrices[0].data, matrices[0].dtype, {static_cast<int64_t>(count), shape[0], shape[1]}};
}
}  // namespace

void products(Context& ctx, const Products& args) {
  const size_t all = args.c.size();
  expect(args.a.size() == all && args.b.size() == all, "products: lists of different lengths");
  for (size_t i = 0, count = 0; i < all; i += count) {
    const auto c = args.c.subspan(i), a = args.a.subspan(i), b = args.b.subspan(i);
    count = std::min({lie_together(c), lie_together(a), lie_together(b)});
    batched_matmul(ctx, {.c = first_of(c, count),
                         .a = first_of(a, count),
                         .b = first_of(b, count),
                         .transpose_a = args.transpose_a,
                         .transpose_b = args.transpose_b,
                         .alpha = args.alpha,
                         .beta = args.beta});
  }
}

std::vector<Tensor> matrices_of(const Tensor& batch) {
  std::vector<Tensor> list;
  for (int64_t i = 0; i < batch.shape[0]; ++i) list.push_back(batch[i]);
  return list;
}

size_t lie_together(std::span<const Tensor> tensors) {
  if (tensors.empty()) return 0;
  size_t count = 1;
  for (; count < tensors.size(); ++count) {
    const Tensor &before = tensors[count - 1], &next = tensors[count];
    const bool alike = next.dtype == before.dtype && next.shape == before.shape;
    if (!alike || next.data != static_cast<std::byte*>(before.data) + before.bytes()) break;
  }
  return count;
}

Tensor stacked(std::span<const Tensor> tensors) {
  if (tensors.empty() || lie_together(tensors) < tensors.size()) return {};
  return first_of(tensors, tensors.size());
}
