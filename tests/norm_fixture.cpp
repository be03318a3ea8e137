#include "tests/norm_fixture.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

std::vector<Norm> matrix_norms() {
  std::vector<Norm> list;
  for (const char* name : {"frobenius",
                           "l1-linf",
                           "scaled-l1-linf",
                           "l2-l2",
                           "rms-rms",
                           "nuclear",
                           "spectral-keller",
                           "spectral-moonlight",
                           "l1-l1",
                           "l1-l1.3333333333333333",
                           "l1-l1.5",
                           "l1-l2",
                           "l1-l3",
                           "l1-rms",
                           "l1.3333333333333333-linf",
                           "l1.5-linf",
                           "l2-linf",
                           "l3-linf",
                           "linf-linf",
                           "rms-linf"})
    list.push_back(*find_norm(name));
  return list;
}

template <typename T>
void check_expected_norms(UseDevice use) {
  const std::pair<const char*, const char*> names[] = {
      {"frobenius", "frobenius"},           {"l1_to_linf_maxabs", "l1-linf"},
      {"l2_to_l2_spectral", "l2-l2"},       {"rms_to_rms", "rms-rms"},
      {"l1_to_l2_maxcol", "l1-l2"},         {"l1_to_rms", "l1-rms"},
      {"l2_to_linf_maxrow", "l2-linf"},     {"rms_to_linf", "rms-linf"},
      {"l1_to_l1_maxcolsum", "l1-l1"},      {"linf_to_linf_maxrowsum", "linf-linf"},
      {"scion_sign_head", "scaled-l1-linf"}};
  const double tolerance = sizeof(T) == 8 ? 1e-9 : 2e-6;
  Context ctx;
  use(ctx);
  ctx.scratch.reserve(int64_t{1} << 20);
  for (const auto& [example, numbers] : optim_golden().at("norm_examples").items()) {
    const MatrixOf<T> g(numbers.at("G"));
    ASSERT_EQ(numbers.at("norms").size(), std::size(names));
    for (const auto& [golden, name] : names)
      for (const bool transposed : {false, true}) {
        SCOPED_TRACE(testing::Message() << example << " " << golden << " " << transposed);
        const Norm kind = *find_norm(name);
        const nlohmann::json& expected = numbers.at("norms").at(golden);
        const MatrixOf<T> stored = transposed ? g.transposed() : g;
        const MatrixOf<T> d = dualized(ctx, kind, stored, transposed);
        EXPECT_NEAR(norm_of(ctx, kind, stored, transposed) / expected.at("norm").template get<double>(), 1,
                    tolerance);
        EXPECT_NEAR(dual_of(ctx, kind, stored, transposed) / expected.at("dual_norm").template get<double>(),
                    1, tolerance);
        EXPECT_LT(deviation(transposed ? d.transposed() : d, MatrixOf<T>(expected.at("dualize"))), tolerance);
      }
    // Not among the expected norms, but made of expected singular values; the polar factor is of full rank.
    double sum = 0, largest = 0;
    for (const double s : numbers.at("singular_values")) {
      sum += s;
      largest = std::max(largest, s);
    }
    const Norm nuclear = *find_norm("nuclear");
    EXPECT_NEAR(norm_of(ctx, nuclear, g) / sum, 1, tolerance) << example;
    EXPECT_NEAR(dual_of(ctx, nuclear, g) / largest, 1, tolerance) << example;
  }
}

template <typename T>
void check_modular_numbers(UseDevice use, double tolerance) {
  Context ctx;
  use(ctx);
  ctx.scratch.reserve(int64_t{1} << 20);
  const nlohmann::json& numbers = optim_golden().at("modular_norm");
  const ThereOf<T> embedding(ctx, MatrixOf<T>(numbers.at("G_embed_storage_vocab_x_d")));
  const ThereOf<T> linear(ctx, MatrixOf<T>(numbers.at("G_linear")));
  const double s_embedding = numbers.at("s").at("embed"), s_linear = numbers.at("s").at("linear");
  const ModularTerm terms[] = {{embedding.tensor(), *find_norm("l1-rms"), s_embedding, /*transposed=*/true},
                               {linear.tensor(), *find_norm("rms-rms"), s_linear, false}};
  const double eta = numbers.at("eta"), of_update = numbers.at("modular_norm_of_update");
  EXPECT_NEAR(
      dual_norm(ctx, terms[0].norm, terms[0].x, true) / numbers.at("dual_norm_embed_l1_to_rms").get<double>(),
      1, tolerance);
  EXPECT_NEAR(
      dual_norm(ctx, terms[1].norm, terms[1].x) / numbers.at("dual_norm_linear_rms_to_rms").get<double>(), 1,
      tolerance);
  EXPECT_NEAR(steepest_descent(ctx, terms, numbers.at("sharpness")) / eta, 1, tolerance);
  EXPECT_LT(deviation(embedding.here(), MatrixOf<T>(numbers.at("dW_embed_storage"))), tolerance);
  EXPECT_LT(deviation(linear.here(), MatrixOf<T>(numbers.at("dW_linear"))), tolerance);
  EXPECT_NEAR(modular_norm(ctx, terms) / of_update, 1, tolerance);
  for (const ModularTerm& term : terms)  // no layer has slack
    EXPECT_NEAR(term.s * norm(ctx, term.norm, term.x, term.transposed) / eta, 1, tolerance);
}

template void check_expected_norms<float>(UseDevice);
template void check_expected_norms<double>(UseDevice);
template void check_modular_numbers<float>(UseDevice, double);
template void check_modular_numbers<double>(UseDevice, double);
