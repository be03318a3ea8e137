#include "model/kernels/cast.h"

#include <type_traits>

#include "model/kernels/simd.h"

namespace {
constexpr int64_t kGrain = 4096;  // elements; a thread with fewer costs more than it helps
constexpr int64_t kTile = 32;     // rows and columns of a tile, whose cache lines are all used before they go

/// Calls body with a pointer to the tensor's memory: float*, double* or Bf16*.
template <typename Body>
void with_pointer(const Tensor& tensor, Body&& body) {
  if (tensor.dtype == DType::bf16) return body(tensor.bf16());
  if (tensor.dtype == DType::f64) return body(tensor.f64());
  body(tensor.f32());
}

template <typename To, typename From>
To convert(From x) {
  if constexpr (std::is_same_v<To, From>)
    return x;
  else if constexpr (std::is_same_v<To, Bf16>)
    return to_bf16(static_cast<float>(x));
  else if constexpr (std::is_same_v<From, Bf16>)
    return to_float(x);
  else
    return static_cast<To>(x);
}
}  // namespace

void cpu::cast(Context& ctx, const Cast& args) {
  with_pointer(args.x, [&](auto* x) {
    with_pointer(args.y, [&](auto* y) {
      deal_out(ctx, args.x.size(), kGrain, [=](int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) y[i] = convert<std::remove_pointer_t<decltype(y)>>(x[i]);
      });
    });
  });
}

void cpu::transpose(Context& ctx, const Transpose& args) {
  const int64_t cols = args.x.cols(), rows = args.y.cols(), batch = args.x.size() / (rows * cols);
  const int64_t tiles = (rows + kTile - 1) / kTile;  // of one matrix, all columns wide
  with_pointer(args.x, [&](auto* from) {
    auto* to = static_cast<decltype(from)>(args.y.data);
    deal_out(ctx, batch * tiles, 1, [=](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const auto* x = from + tile / tiles * rows * cols;
        auto* y = to + tile / tiles * rows * cols;
        const int64_t r0 = tile % tiles * kTile, r1 = std::min(rows, r0 + kTile);
        for (int64_t c = 0; c < cols; ++c)
          for (int64_t r = r0; r < r1; ++r) y[c * rows + r] = x[r * cols + c];
      }
    });
  });
}
