#include "tests/op_cases.h"

#include <array>
#include <utility>

#include "tests/cases/all.h"

std::vector<OpCase> test_cases() {
  std::vector<OpCase> cases;
  const auto add = [&](OpCase made) { cases.push_back(std::move(made)); };
  for (const auto& [B, T, C] :
       {std::array<int64_t, 3>{1, 1, 1}, {2, 1, 7}, {1, 3, 16}, {3, 5, 33}, {2, 41, 259}}) {
    add(gelu_forward_case(B, T, C));
    add(gelu_backward_case(B, T, C, false));
    add(gelu_backward_case(B, T, C, true));
    for (Residual fused : {Residual::none, Residual::separate, Residual::in_place})
      add(layernorm_forward_case(B, T, C, fused));
    if (C > 1)
      add(layernorm_backward_case(B, T, C, false, false));  // C = 1: exactly 0, nothing to be relative to
    add(layernorm_backward_case(B, T, C, true, false, Into::dresidual));
    add(layernorm_backward_case(B, T, C, true, true, Into::dy));
    add(embedding_forward_case(B, T, C, 13));
    add(embedding_backward_case(B, T, C, 13, false, false));
    add(embedding_backward_case(B, T, C, 13, true, false));
    add(embedding_backward_case(B, T, C, 13, true, true));
  }
  add(layernorm_forward_case(2, 3, 100, Residual::none, 1000));
  // Widths of models, and around the limits of how many lanes of a GPU share a row.
  for (int64_t C : {128, 256, 264, 512, 768, 1024, 1280, 1600, 2048, 3072, 4096, 6144, 6152}) {
    add(layernorm_forward_case(1, 11, C, Residual::separate));
    add(layernorm_backward_case(1, 11, C, true, true, Into::dresidual));
  }
  add(layernorm_backward_case(2, 41, 768, false, false));
  add(layernorm_backward_case(2, 4150, 8, true, true));  // all blocks of a GPU
  add(embedding_forward_case(2, 5, 768, 29));
  add(embedding_backward_case(3, 67, 64, 7, true, true));  // tokens in many groups of the GPU
  add(embedding_backward_case(2, 150, 264, 2, false, false));
  add(embedding_backward_case(7, 41, 36, 1, true, false));  // one token everywhere
  add(embedding_backward_case(1, 64, 1032, 500, true, false));
  for (const auto& [N, V, Vp] : {std::array<int64_t, 3>{1, 1, 1},
                                 {1, 257, 384},
                                 {5, 33, 33},
                                 {9, 1025, 1152},
                                 {3, 5001, 5120},
                                 {2, 50257, 50304},
                                 {1, 120001, 120064}})  // longer than the shared memory of a GPU
    for (bool gradient : {false, true}) add(cross_entropy_case(N, V, Vp, gradient));
  for (Orientation o : {kNN, kNT, kTN, kTT}) {
    add(matmul_case(1, 1, 1, o));
    add(matmul_case(7, 33, 65, o, true));
    add(matmul_case(7, 33, 65, o, false, -0.5f, 2));
    add(matmul_case(130, 67, 129, o, true, 2, 0.5f));
    add(batched_matmul_case(3, 9, 17, Symmetry::none, o));
  }
  add(matmul_case(1, 50, 40, kNT, true));
  for (const auto& [rows, out, in] :
       {std::array<int64_t, 3>{1, 1, 1}, {7, 33, 65}, {9, 40, 24}, {130, 72, 31}, {600, 16, 9}}) {
    for (bool bias : {false, true}) add(matmul_gelu_case(rows, out, in, bias));
    add(matmul_dgelu_case(rows, out, in));
    for (bool accumulate : {false, true})
      for (bool dbias : {false, true}) add(weight_gradient_case(rows, out, in, accumulate, dbias));
  }
  for (int64_t M : {1, 7, 65, 200, 300}) {
    add(batched_matmul_case(3, M, M + 11, Symmetry::gram));
    add(batched_matmul_case(2, M, M, Symmetry::square));
  }
  // float64: one block, several for each thread, and triangles.
  for (Orientation o : {kNN, kNT, kTN, kTT})
    add(in_float64(batched_matmul_case(3, 9, 17, Symmetry::none, o)));
  for (int64_t M : {1, 65, 300}) {
    add(in_float64(batched_matmul_case(3, M, M + 11, Symmetry::gram)));
    add(in_float64(batched_matmul_case(2, M, M, Symmetry::square)));
  }
  add(batched_matmul_case(1, 300, 70, Symmetry::gram));
  add(batched_matmul_case(1, 700, 20, Symmetry::gram));
  for (Orientation o : {kNN, kNT, kTN})  // large enough to be cut among threads
    for (float beta : {0.0f, 2.0f}) add(matmul_case(300, 280, 31, o, true, 1, beta));
  for (const auto& [rows, in, out] : {std::array<int64_t, 3>{1, 1, 1}, {1, 7, 5}, {9, 17, 33}})
    add(linear_backward_case(rows, in, out));
  for (const auto& [rows, cols] :
       {std::pair<int64_t, int64_t>{1, 1}, {1, 33}, {7, 1}, {31, 100}, {130, 259}}) {
    for (bool accumulate : {false, true}) add(bias_backward_case(rows, cols, accumulate));
    for (bool to_float : {false, true}) add(cast_case(rows, cols, to_float));
    for (bool to_wide : {false, true}) add(cast_wide_case(rows, cols, to_wide));
    add(transpose_case(1, rows, cols));
    for (bool by_rows : {true, false}) {
      add(norms_case(by_rows, rows, cols));
      add(in_float64(norms_case(by_rows, rows, cols)));
      for (bool divide : {true, false}) {
        add(scale_case(by_rows, rows, cols, divide, divide));
        add(in_float64(scale_case(by_rows, rows, cols, divide, divide)));
      }
    }
    add(scale_twice_case(rows, cols, true));
    add(in_float64(scale_twice_case(rows, cols, false)));
  }
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{513, 40}, {1100, 256}, {700, 1031}})
    add(bias_backward_case(rows, cols, true));
  for (bool to_float : {false, true}) add(cast_case(64, 72, to_float));
  for (int64_t batch : {2, 3}) add(transpose_case(batch, 64, 128 + batch));
  for (bool by_rows : {true, false}) {  // longer than one part
    add(norms_case(by_rows, by_rows ? 3 : 700, by_rows ? 20003 : 65));
    add(in_float64(norms_case(by_rows, by_rows ? 3 : 700, by_rows ? 20003 : 65)));
    add(in_float64(norms_case(by_rows, by_rows ? 2 : 513, by_rows ? 8192 : 40)));
    add(in_float64(scale_case(by_rows, 30, 40, true, false)));
    add(norms_case(by_rows, by_rows ? 2 : 513, by_rows ? 8192 : 40));
  }
  for (const int64_t cols : {70001, 131072}) {  // rows that the threads of a CPU share
    add(norms_case(true, 2, cols));
    add(scale_case(true, 2, cols, true, false));
    add(scale_twice_case(2, cols, true));
  }
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{139, 4500}, {5003, 3}, {77, 700}})
    add(norms_case(false, rows,
                   cols));  // several sweeps, long slabs, rows that are read as one and some left
  // Less than a tile of columns, several, and rows and columns longer than a block; aligned and not.
  for (const Exponent q : {Exponent{1, 1}, {4, 3}, {3, 2}, {2, 1}, {3, 1}, {1, 0}})
    for (const Lines lines : {Lines::rows, Lines::columns})
      for (const DType dtype : {DType::f32, DType::f64})
        for (const auto& [batch, rows, cols] :
             {std::array<int64_t, 3>{1, 1, 1}, {1, 7, 33}, {3, 5, 20}, {2, 75, 130}, {1, 3, 1032}}) {
          const bool in_place = cols % 2 == 0;
          add(line_norms_case({batch, rows, cols, lines, q, dtype}));
          add(line_duals_case({batch, rows, cols, lines, q, dtype, in_place}));
        }
  // Rows of a warp and of several blocks on a GPU, rows that threads share on the CPU, and slabs of columns.
  for (const Lines lines : {Lines::rows, Lines::columns})
    for (const UnitInto to : {UnitInto::u, UnitInto::g, UnitInto::w, UnitInto::cautious})
      for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{1, 1},
                                       {5, 33},
                                       {130, 260},
                                       {3, 8196},
                                       {1, 70001},
                                       {2, 65540},
                                       {517, 36}}) {
        if (lines == Lines::columns && cols > 60000) continue;  // long rows are what these are for
        add(unit_lines_case(lines, rows, cols, to));
        add(in_float64(unit_lines_case(lines, rows, cols, to)));
        if (to != UnitInto::u) continue;
        add(unit_lines_of_known_norms_case(lines, rows, cols));
        add(in_float64(unit_lines_of_known_norms_case(lines, rows, cols)));
      }
  for (const char* op : {"sum_of_squares", "dot", "sum_abs", "max_abs"})
    for (int64_t n : {1, 15, 1025, 300000}) {
      add(whole_tensor_case(op, n));
      add(in_float64(whole_tensor_case(op, n)));
    }
  for (int64_t n : {1, 15, 1025, 300003})
    for (bool sums : {false, true})
      for (bool steps : {false, true}) {
        add(escape_sums_case(n, sums, steps));
        add(in_float64(escape_sums_case(n, sums, steps)));
      }
  for (const auto& [count, n] : {std::pair<int64_t, int64_t>{1, 7}, {3, 8191}, {2, 20000}, {90, 5}})
    for (bool first : {false, true})
      for (bool moves : {false, true}) {
        add(hyperball_case(count, n, first, moves));
        add(in_float64(hyperball_case(count, n, first, moves)));
      }
  for (int64_t n : {1, 33, 5000})
    for (bool accumulate : {false, true}) add(mean_case(n, accumulate));
  // One tensor, some of odd sizes, larger than a chunk, and more than the arguments of a launch list.
  for (const auto& [count, n] : {std::pair<int64_t, int64_t>{1, 1}, {3, 8191}, {4, 20000}, {150, 5}}) {
    add(sums_of_squares_case(count, n));
    add(in_float64(sums_of_squares_case(count, n)));
    for (HalfSmooth half : {HalfSmooth::none, HalfSmooth::u, HalfSmooth::g}) {
      add(smooth_case(count, n, false, false, half));
      add(smooth_case(count, n, true, false, half));
    }
    add(smooth_case(count, n, true, true, HalfSmooth::none));
    add(smooth_case(count, n, true, true, HalfSmooth::u));
    for (bool remember : {false, true})
      add(in_float64(smooth_case(count, n, remember, remember, HalfSmooth::none)));
    for (SmoothRule rule : {SmoothRule::sgd, SmoothRule::nesterov, SmoothRule::lion, SmoothRule::sign}) {
      add(smooth_into_case(count, n, rule));
      add(in_float64(smooth_into_case(count, n, rule)));
    }
    for (bool first : {false, true})
      for (bool second : {false, true}) {
        add(adam_case(count, n, first, second));
        add(adam_case(count, n, first, second, /*into=*/true));
        add(in_float64(adam_case(count, n, first, second, /*into=*/second)));
      }
    add(sign_case(count, n));
    add(in_float64(sign_case(count, n)));
    for (bool cautious : {false, true}) {
      add(apply_update_case(count, n, cautious));
      add(in_float64(apply_update_case(count, n, cautious)));
    }
  }
  for (int64_t n : {1, 149, 1000})
    for (double limit : {0, 1, 1000}) add(clip_factor_case(n, limit));
  for (const auto& [B, T, NH, HS] :
       {std::array<int64_t, 4>{1, 1, 1, 3}, {2, 7, 3, 4}, {1, 70, 2, 20}, {1, 66, 1, 80}}) {
    // On a GPU, heads of 64 and 128 in bf16 round inside too: test_gpu_attention.cpp has bounds for that.
    for (bool row_max : {false, true}) add(attention_forward_case(B, T, NH, HS, attention_forward, row_max));
    add(attention_backward_case(B, T, NH, HS));
  }
  for (const auto& [B, NH, T] : {std::array<int64_t, 3>{1, 1, 1}, {2, 3, 7}, {3, 2, 1025}})
    for (bool accumulate : {false, true}) add(head_max_case(B, NH, T, accumulate));
  // Heads in one piece of a pack and not, weights of several chunks, more tensors than a launch lists.
  for (const auto& [count, NH, HS] : {std::array<int64_t, 3>{1, 1, 1}, {2, 3, 5}, {3, 6, 16}, {40, 2, 3}})
    for (float alpha : {0.5f, 0.2f}) add(qk_clip_case(count, NH, HS, alpha));
  add(add_diagonal_case(1, 1));
  add(add_diagonal_case(3, 41));
  add(in_float64(add_diagonal_case(3, 41)));
  return cases;
}

std::vector<OpCase> training_cases(const TrainingSizes& sizes) {
  const auto [B, T, C, NH, V, chunk] = sizes;
  const int64_t BT = B * T, Vp = (V + 127) / 128 * 128;
  std::vector<OpCase> cases{embedding_forward_case(B, T, C, Vp),
                            embedding_backward_case(B, T, C, Vp, true, false),
                            layernorm_forward_case(B, T, C, Residual::none),
                            layernorm_forward_case(B, T, C, Residual::separate),
                            layernorm_backward_case(B, T, C, true, false, Into::dresidual),
                            gelu_forward_case(B, T, 4 * C),
                            gelu_backward_case(B, T, 4 * C, true),
                            bias_backward_case(BT, C, false),
                            bias_backward_case(BT, 4 * C, false),
                            attention_forward_case(B, T, NH, C / NH),
                            attention_backward_case(B, T, NH, C / NH),
                            cast_case(4 * C, C, false),
                            transpose_case(12, C, C),
                            cross_entropy_case(chunk, V, Vp, false),
                            cross_entropy_case(chunk, V, Vp, true),
                            cross_entropy_case(BT, 257, 384, true),
                            whole_tensor_case("sum_of_squares", Vp * C),
                            whole_tensor_case("dot", 4 * C * C),
                            whole_tensor_case("max_abs", 4 * C * C),
                            sums_of_squares_case(72, C * C),
                            smooth_case(72, C * C, true, true, HalfSmooth::u),
                            smooth_case(72, C * C, false, false, HalfSmooth::g),
                            adam_case(1, Vp * C, true, true),
                            adam_case(1, Vp * C, true, true, /*into=*/true),
                            smooth_into_case(72, C * C, SmoothRule::lion),
                            apply_update_case(72, C * C, false),
                            norms_case(true, Vp, C),
                            norms_case(false, 4 * C, C),
                            scale_case(true, Vp, C, true, true),
                            scale_case(false, 4 * C, C, true, true),
                            unit_lines_case(Lines::rows, 4 * C, C, UnitInto::w),
                            unit_lines_case(Lines::columns, 4 * C, C, UnitInto::w),
                            unit_lines_case(Lines::rows, 1, 4 * C * C, UnitInto::w),
                            escape_sums_case(4 * C * C, true),
                            escape_sums_case(4 * C * C, true, true),
                            hyperball_case(12, 4 * C * C, false, true)};
  for (const auto& [out, in] : {std::pair<int64_t, int64_t>{3 * C, C}, {C, C}, {4 * C, C}, {C, 4 * C}}) {
    cases.push_back(matmul_case(BT, out, in, kNT, true));  // forward
    cases.push_back(matmul_case(BT, in, out, kNN));        // input gradient
    cases.push_back(matmul_case(out, in, BT, kTN));        // weight gradient
  }
  cases.push_back(matmul_gelu_case(BT, 4 * C, C, true));
  cases.push_back(matmul_dgelu_case(BT, 4 * C, C));
  for (const auto& [out, in] : {std::pair<int64_t, int64_t>{4 * C, C}, {C, 4 * C}})
    cases.push_back(weight_gradient_case(BT, out, in, true, true));
  cases.push_back(matmul_case(chunk, Vp, C, kNT));  // the head, a chunk of rows
  cases.push_back(matmul_case(chunk, C, Vp, kNN));
  cases.push_back(matmul_case(Vp, C, chunk, kTN, false, 1, 1));
  for (const auto& [batch, M, K] : {std::array<int64_t, 3>{12, C, C}, {12, C, 4 * C}, {6, C / 2, C / 2}}) {
    cases.push_back(batched_matmul_case(batch, M, K, Symmetry::gram));
    if (K == M) cases.push_back(batched_matmul_case(batch, M, M, Symmetry::square));
  }
  return cases;
}
