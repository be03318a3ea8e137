#include "model/kernels/embedding.h"

#include <numeric>

#include "model/kernels/simd.h"

namespace {
constexpr int64_t kRowGrain = 8;       // tokens
constexpr int64_t kChannelGrain = 16;  // channels: one cache line, so that threads never share one

/// Throws unless every token names a row of the table. Cheap beside the rows that are read for it.
void check_tokens(const Tensor& tokens, int64_t rows, const char* message) {
  const int32_t* token = tokens.i32();
  bool ok = true;
  for (int64_t i = 0; i < tokens.size(); ++i) ok = ok && token[i] >= 0 && token[i] < rows;
  expect(ok, message);
}
}  // namespace

void cpu::embedding_forward(Context& ctx, const EmbeddingForward& args) {
  check_tokens(args.tokens, args.wte.rows(), "embedding_forward: a token is outside the rows of wte");
  const int64_t T = args.tokens.shape[1], C = args.wte.cols();
  const int32_t* tokens = args.tokens.i32();
  const float* wte = args.wte.f32();
  const float* wpe = args.wpe.f32();
  float* y = args.y.f32();
  parallel_for(ctx, args.tokens.size(), kRowGrain, [=](int64_t begin, int64_t end, int) {
    for (int64_t bt = begin; bt < end; ++bt) {
      const float* token = wte + tokens[bt] * C;
      const float* position = wpe + bt % T * C;
#pragma omp simd
      for (int64_t c = 0; c < C; ++c) y[bt * C + c] = token[c] + position[c];
    }
  });
}

void cpu::embedding_backward(Context& ctx, const EmbeddingBackward& args) {
  check_tokens(args.tokens, args.dwte.rows(), "embedding_backward: a token is outside the rows of dwte");
  const int64_t T = args.tokens.shape[1], C = args.dwte.cols(), BT = args.tokens.size();
  const int64_t V = args.dwte.rows(), positions = args.dwpe.rows();
  const bool clear_wte = !args.accumulate_wte, clear_wpe = !args.accumulate_wpe;
  const int32_t* tokens = args.tokens.i32();
  const float* dy = args.dy.f32();
  float* dwte = args.dwte.f32();
  float* dwpe = args.dwpe.f32();
  // Two tokens of a batch are often the same, so threads cannot share the tokens; they share the channels.
  parallel_for(ctx, C, kChannelGrain, [=](int64_t begin, int64_t end, int) {
    if (clear_wte)
      for (int64_t v = 0; v < V; ++v) std::fill(dwte + v * C + begin, dwte + v * C + end, 0.0f);
    if (clear_wpe)
      for (int64_t t = 0; t < positions; ++t) std::fill(dwpe + t * C + begin, dwpe + t * C + end, 0.0f);
    for (int64_t bt = 0; bt < BT; ++bt) {
      float* token = dwte + tokens[bt] * C;
      float* position = dwpe + bt % T * C;
      const float* gradient = dy + bt * C;
#pragma omp simd
      for (int64_t c = begin; c < end; ++c) {
        token[c] += gradient[c];
        position[c] += gradient[c];
      }
    }
  });
}

void sort_tokens(std::span<const int32_t> tokens, int64_t V, std::span<int32_t> order) {
  expect(tokens.size() == order.size(), "sort_tokens: order must be as long as tokens");
  const auto bin = [=](int32_t token) { return static_cast<size_t>(token < 0 || token >= V ? V : token); };
  std::vector<int32_t> next(static_cast<size_t>(V) + 2);  // where the next token of each bin goes
  for (const int32_t token : tokens) ++next[bin(token) + 1];
  std::partial_sum(next.begin(), next.end(), next.begin());
  for (size_t i = 0; i < tokens.size(); ++i)
    order[static_cast<size_t>(next[bin(tokens[i])]++)] = static_cast<int32_t>(i);
}
