#include "tests/optim_checks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "error.h"
#include "model/kernels/reduce.h"
#include "optim/norm.h"

namespace {
constexpr Trajectory kTrajectories[] = {
    {"sgd", "sgd:lr=0.1"},
    {"sgd_momentum", "sgd:lr=0.1,momentum=0.9"},
    {"sgd_nesterov", "sgd:lr=0.1,momentum=0.9,nesterov=1"},
    {"lmo_frobenius", "sgd:lr=0.05,normalize=1"},
    {"lmo_l1_to_linf_maxabs", "sign:lr=0.05"},
    {"lmo_l2_to_l2_spectral", "spectral:lr=0.05,ns=svd", 0, 1e-4},
    {"lmo_rms_to_rms", "spectral:lr=0.05,ns=svd,scale=rms", 0, 1e-4},
    {"lmo_l1_to_rms", "colnorm:lr=0.05"},
    {"lmo_l1_to_l2_maxcol", "colnorm:lr=0.05,norm=l1-l2"},
    {"lmo_l2_to_linf_maxrow", "rownorm:lr=0.05,norm=l2-linf"},
    {"lmo_rms_to_linf", "rownorm:lr=0.05"},
    {"steepest_frobenius", "sgd", 20},
    {"steepest_l1_to_linf_maxabs", "sign", 20},
    {"steepest_l2_to_l2_spectral", "spectral:ns=svd", 20, 1e-4},
    {"steepest_rms_to_rms", "spectral:ns=svd,scale=rms", 20, 1e-4},
    {"steepest_l1_to_rms", "colnorm", 20},
    {"steepest_l1_to_l2_maxcol", "colnorm:norm=l1-l2", 20},
    {"steepest_l2_to_linf_maxrow", "rownorm:norm=l2-linf", 20},
    {"steepest_rms_to_linf", "rownorm", 20},
    {"signum", "signum:lr=0.01,beta=0.9"},
    {"lion", "lion:lr=0.01,beta1=0.9,beta2=0.99,wd=0.1"},
    {"adam", "adam:lr=0.01,beta1=0.9,beta2=0.95,eps=1e-8"},
    {"adam_no_bias", "adam:lr=0.01,beta1=0.9,beta2=0.95,eps=0,bias_correction=0"},
    {"adam_beta0", "adam:lr=0.01,beta1=0,beta2=0,eps=0"},
    {"adamw", "adam:lr=0.01,beta1=0.9,beta2=0.95,eps=1e-8,wd=0.1"},
    {"adamw_cautious_wd", "adam:lr=0.01,beta1=0.9,beta2=0.95,eps=1e-8,wd=0.1,cautious=1"},
    {"shampoo_no_accum", "spectral:lr=0.05,ns=svd", 0, 1e-4},  // equal by its equations 15-16
    {"muon_keller", "muon:lr=0.02,momentum=0.95,wd=0.01,ns=keller5,scale=keller,ns_eps=1e-7", 0, 1e-4},
    {"muon_torch", "muon:lr=0.02,momentum=0.95,wd=0.1,ema=0,ns_eps=1e-7", 0, 1e-4},
    {"muon_moonlight", "muon:lr=0.02,momentum=0.95,wd=0.1,ema=0,scale=moonlight,ns_eps=1e-7", 0, 1e-4},
    {"muon_rms_exact", "muon:lr=0.02,momentum=0.95,nesterov=0,ns=svd,scale=rms", 0, 1e-4},
    {"muon_polar_express", "muon:lr=0.02,momentum=0.95,wd=0.01,ns=polar-express,ns_eps=1e-6", 0, 1e-4},
    {"muon_quintic12", "muon:lr=0.025,momentum=0.95,wd=0.05,ns=quintic12,ns_eps=1e-7", 0, 1e-4},
    {"muon_cautious_wd", "muon:lr=0.02,momentum=0.95,wd=0.1,ns=svd,cautious=1", 0, 1e-4},
    {"muon_hyperball", "muon:lr=0.02,momentum=0.95,ns=svd,hyperball=1", 0, 1e-4},
    {"normuon", "normuon:lr=0.02,momentum=0.95,beta2=0.95,wd=0.01,ns=svd", 0, 1e-4},
    {"scion_spectral", "scion:lr=0.02,alpha=0.1,radius=3,constrained=1,ns=svd", 0, 1e-4},
    {"scion_spectral_unconstrained", "scion:lr=0.02,alpha=0.1,radius=3,ns=svd", 0, 1e-4},
    {"scion_sign", "scion:lr=0.02,alpha=0.1,radius=5,constrained=1,norm=scaled-l1-linf"},
    {"scion_colnorm", "scion:lr=0.02,alpha=0.1,constrained=1,norm=l1-rms"},
    {"scion_rownorm", "scion:lr=0.02,alpha=0.1,constrained=1,norm=rms-linf"},
    {"dion_rank1", "dion:lr=0.02,momentum=0.95,wd=0.01,rank=1"},
};

template <typename T>
void check_trajectory(const Trajectory& row, double tolerance, UseDevice use) {
  SCOPED_TRACE(std::string(row.name) + (sizeof(T) == 8 ? ", float64" : ", float32"));
  const nlohmann::json& expected = optim_golden().at("optimizers").at(row.name);
  RuleDriverOf<T> driver(row.rule, {start_weight<T>()}, /*transposed=*/false, use);
  RuleDriverOf<T> stored(row.rule, {start_weight<T>().transposed()}, /*transposed=*/true, use);
  if (expected.at("hyper").contains("Q0"))
    for (RuleDriverOf<T>* each : {&driver, &stored})
      each->set_state("q", MatrixOf<T>(expected.at("hyper").at("Q0")));
  for (size_t t = 0; t < 3; ++t) {
    const MatrixOf<T> want(expected.at("W").at(t));
    driver.step({fixed_gradient<T>(t)}, row.sharpness);
    EXPECT_LT(deviation(driver.weight(), want), tolerance) << "step " << t;
    stored.step({fixed_gradient<T>(t).transposed()}, row.sharpness);
    EXPECT_LT(deviation(stored.weight().transposed(), want), tolerance) << "stored, step " << t;
  }
}
}  // namespace

std::span<const Trajectory> trajectories() {
  return kTrajectories;
}

void check_trajectories(UseDevice use) {
  for (const Trajectory& row : kTrajectories) {
    check_trajectory<float>(row, row.tolerance, use);
    check_trajectory<double>(row, 1e-9, use);
  }
}

void check_equalities(UseDevice use) {
  EXPECT_EQ(after_three("adam:lr=0.01,beta1=0,beta2=0,eps=0", use).data,
            after_three("sign:lr=0.01", use).data);
  EXPECT_EQ(after_three("signum:lr=0.01,beta=0", use).data, after_three("sign:lr=0.01", use).data);
  EXPECT_EQ(after_three("lion:lr=0.01,beta1=0.9,beta2=0.9", use).data,
            after_three("signum:lr=0.01,beta=0.9", use).data);
  EXPECT_EQ(after_three("scion:lr=0.01,alpha=1,norm=l1-linf", use).data,
            after_three("sign:lr=0.01", use).data);
  EXPECT_EQ(after_three("scion:lr=0.01,alpha=1,ns=svd", use).data,
            after_three("spectral:lr=0.01,ns=svd,scale=rms", use).data);
  EXPECT_LT(
      deviation(after_three("scion:lr=0.01,radius=5,constrained=1", use),
                after_three("muon:lr=0.05,wd=0.2,momentum=0.9,nesterov=0,ns=polar-express,scale=rms", use)),
      1e-6);
  EXPECT_EQ(after_three("muon:lr=0.01,momentum=0,ns=svd,scale=none", use).data,
            after_three("spectral:lr=0.01,ns=svd", use).data);
  EXPECT_EQ(after_three("sgd:lr=0.01,momentum=0.5,ema=1", use).data,
            after_three("sgd:lr=0.005,momentum=0.5", use).data);
  EXPECT_EQ(after_three("sign:lr=0.01,s=2", use).data, after_three("sign:lr=0.005", use).data);
}

void check_clipping(UseDevice use) {
  for (const char* vectors : {"adam:eps=1e-3", "sgd:lr=0.1", "sgd:momentum=0.9"}) {
    OptimizerOptions options = everywhere(vectors, vectors);
    SmallModel plain(options, use);
    options.grad_clip = 0.05;
    SmallModel clipped(options, use);
    for (int64_t t = 0; t < 3; ++t) {
      const StepReport report = clipped.step(t);
      EXPECT_NEAR(report.clip_scale, 0.05 / report.grad_norm, 1e-12);
      EXPECT_LT(report.clip_scale, 1);
      plain.set_gradients(t);
      double squares = 0;
      for (const Parameter& p : plain.table) {
        Matrix grad = download(plain.ctx, p.grad);
        squares += inner(grad, grad);
        upload(plain.ctx, p.grad, scaled(grad, static_cast<float>(report.clip_scale)));
      }
      EXPECT_NEAR(report.grad_norm / std::sqrt(squares), 1, 1e-9);
      plain.optimizer.step(t, 20);
    }
    const auto a = plain.weights(), b = clipped.weights();
    for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-6);
  }
}

namespace {
void check_non_finite(const OptimizerOptions& options, float bad, UseDevice use) {
  SCOPED_TRACE(options.rules.at(Role::hidden));
  SmallModel model(options, use);
  model.step(0);
  const auto weights = model.weights(), before = model.state();
  const Tensor poisoned = model.table.at("h.1.mlp.c_fc.weight").grad;
  for (int64_t t : {1, 2}) {
    model.set_gradients(t);
    Matrix grad = download(model.ctx, poisoned);
    grad.data[5] = bad;
    upload(model.ctx, poisoned, grad);
    model.optimizer.step(t, 20);
    EXPECT_EQ(model.weights(), weights);
    EXPECT_EQ(model.state(), before);
  }
  try {
    model.optimizer.report();
    FAIL() << "no error";
  } catch (const RunError& error) {
    EXPECT_NE(std::string(error.what()).find("h.1.mlp.c_fc.weight"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("step 2"), std::string::npos);
  }
  model.step(3);
  EXPECT_NE(model.weights(), weights);
  for (float w : model.weights()) ASSERT_TRUE(std::isfinite(w));
}
}  // namespace

void check_non_finite(UseDevice use) {
  for (const char* recipe : {"muon", "adamw", "modular"})
    check_non_finite(recipe_options(recipe), std::nanf(""), use);
  for (const float bad : {INFINITY, -INFINITY})  // one bad value reaches all recipes the same way
    check_non_finite(recipe_options("muon"), bad, use);
  for (OptimizerOptions options : every_rule())
    for (const double clip : {0.0, 0.01}) {
      options.grad_clip = clip;
      check_non_finite(options, std::nanf(""), use);
    }
}

void check_zero_gradients(UseDevice use) {
  for (const OptimizerOptions& options : every_rule(":wd=0")) {
    SCOPED_TRACE(options.rules.at(Role::hidden));
    SmallModel model(options, use);
    const auto weights = model.weights();
    for (int64_t t = 0; t < 2; ++t) {
      for (const Parameter& p : model.table) upload(model.ctx, p.grad, Matrix(1, p.size()));
      model.optimizer.step(t, 0);
    }
    EXPECT_EQ(model.weights(), weights);
    for (const float x : model.state()) ASSERT_TRUE(std::isfinite(x));
  }
}

void check_extreme_gradients(UseDevice use) {
  const std::set<std::string> keeps_squares = {"oneside", "prodigy"};  // those of denormal gradients are 0
  for (const RuleEntry& entry : rule_table()) {
    const auto check = [&](const char* what, const Matrix& w, const Matrix& g, bool transposed,
                           bool may_stand_still = false) {
      RuleDriver driver(entry.name, {w}, transposed, use);
      for (int t = 0; t < 2; ++t) {
        driver.step({g});
        for (const float u : driver.direction().data)
          ASSERT_TRUE(std::isfinite(u)) << entry.name << ", " << what;
      }
      const double downhill = inner(driver.direction(), scaled(g, 1 / std::sqrt(inner(g, g))));
      EXPECT_TRUE(downhill > 0 || (may_stand_still && downhill == 0)) << entry.name << ", " << what;
    };
    for (const bool transposed : {false, true}) {
      const Matrix w = random_matrix(6, 9, 1), g = random_matrix(6, 9, 2);
      check("a row", random_matrix(1, 7, 3), random_matrix(1, 7, 4), transposed);
      check("a column", random_matrix(7, 1, 3), random_matrix(7, 1, 4), transposed);
      check("one number", random_matrix(1, 1, 3), random_matrix(1, 1, 4), transposed);
      check("rank 1", w, product(random_matrix(6, 1, 5), random_matrix(1, 9, 6)), transposed);
      check("1e-20", w, scaled(g, 1e-20), transposed);
      check("1e-40, denormal", w, scaled(g, 1e-40), transposed, keeps_squares.contains(entry.name));
      check("1e20", w, scaled(g, 1e20), transposed);
    }
  }
}

void check_scion_stays_in_its_ball(UseDevice use) {
  for (const char* name : {"rms-rms", "scaled-l1-linf", "l1-rms", "rms-linf", "frobenius"}) {
    const std::string keys = name == std::string("rms-rms") ? ",ns=svd" : "";
    Context ctx;
    use(ctx);
    ctx.scratch.reserve(1 << 20);
    const Norm kind = *find_norm(name);
    const auto size = [&](const Matrix& w) { return norm(ctx, kind, There(ctx, w).tensor()); };
    Matrix w = random_matrix(5, 3, 1);
    w = scaled(w, 2 / size(w));  // on the boundary
    RuleDriver driver(std::string("scion:lr=0.05,radius=2,constrained=1,norm=") + name + keys, {w},
                      /*transposed=*/false, use);
    double largest = 0, smallest = 2;
    for (uint32_t t = 0; t < 500; ++t) {
      driver.step({random_matrix(5, 3, 100 + t)});
      const double now = size(driver.weight());
      largest = std::max(largest, now), smallest = std::min(smallest, now);
    }
    EXPECT_LT(largest, 2 * (1 + 1e-5)) << name;
    EXPECT_LT(smallest, 1.9) << name;  // it does move
  }
}

void check_hyperball_keeps_the_size(UseDevice use) {
  for (const char* rule : {"muon:hyperball=1", "adam:hyperball=1", "muon:hyperball=1,momentum=0"}) {
    const Matrix w = random_matrix(5, 3, 1);
    RuleDriver driver(rule, {w}, /*transposed=*/false, use);
    for (uint32_t t = 0; t < 500; ++t) {
      driver.step({random_matrix(5, 3, 100 + t)});
      const Matrix now = driver.weight();
      ASSERT_NEAR(inner(now, now) / inner(w, w), 1, 1e-5) << rule << ", step " << t;
    }
    EXPECT_GT(deviation(driver.weight(), w), 0.01) << rule;
  }
}

void check_normuon_evens_lines(UseDevice use) {
  struct Case {
    int64_t rows, cols;
    const char* keys;
    bool by_rows;
  };
  for (const Case& c : {Case{9, 4, "", true}, {9, 4, ",axis=auto", true}, {4, 9, ",axis=auto", false}}) {
    const Matrix w(c.rows, c.cols);
    const std::string keys = ":momentum=0.5,ns=svd";
    RuleDriver even("normuon" + keys + c.keys, {w}, false, use), plain("muon" + keys, {w}, false, use);
    for (uint32_t t = 0; t < 30; ++t) {
      Matrix g = random_matrix(c.rows, c.cols, 200 + t);
      for (int64_t k = 0; k < (c.by_rows ? c.cols : c.rows); ++k) (c.by_rows ? g(0, k) : g(k, 0)) *= 0.1f;
      even.step({g});
      plain.step({g});
    }
    const Matrix p = even.direction(), o = plain.direction();
    EXPECT_NEAR(inner(p, p) / inner(o, o), 1, 1e-5);
    const auto smallest_line = [&](Matrix m) {
      if (!c.by_rows) m = m.transposed();
      double smallest = 1e30;
      for (int64_t i = 0; i < m.rows; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < m.cols; ++j) sum += m(i, j) * m(i, j);
        smallest = std::min(smallest, std::sqrt(sum));
      }
      return smallest;
    };
    EXPECT_GT(smallest_line(p), 2 * smallest_line(o)) << c.keys;
  }
}

void check_late_reports(UseDevice use) {
  SmallModel model(recipe_options("adamw"), use), prompt(recipe_options("adamw"), use);
  std::vector<int64_t> tickets;
  for (int64_t t = 0; t < 4; ++t) {
    model.set_gradients(t);
    model.optimizer.step(t, 20);
    tickets.push_back(model.optimizer.mark());
    const StepReport want = prompt.step(t);
    EXPECT_EQ(want.step, t);
    if (t == 0) continue;
    const StepReport late = model.optimizer.report(tickets[static_cast<size_t>(t)]);
    EXPECT_EQ(late.step, t);
    EXPECT_EQ(late.grad_norm, want.grad_norm);
    EXPECT_EQ(late.lr, want.lr);
    EXPECT_EQ(model.optimizer.report(tickets[static_cast<size_t>(t) - 1]).step, t - 1);
  }
  EXPECT_THROW(model.optimizer.report(tickets[1]), std::logic_error);
}
