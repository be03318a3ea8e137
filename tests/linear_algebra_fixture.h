// What the tests of eigenvalues, bases and inverse roots share: where they run, and the way there and back.
#pragma once

#include <gtest/gtest.h>

#include <memory>

#include "optim/eigen.h"
#include "optim/inverse_root.h"
#include "tests/optim_golden.h"

/// Where and in which numbers a body runs, with the accuracy of those.
struct Setting {
  UseDevice use;
  DType dtype;
  double unit() const { return dtype == DType::f64 ? 1e-13 : 1e-6; }
};

/// A context with the setting's dtype, and the way there and back.
class Bench {
 public:
  explicit Bench(const Setting& setting, int64_t scratch_bytes = int64_t{16} << 20)
      : unit(setting.unit()), dtype_(setting.dtype) {
    setting.use(ctx);
    ctx.scratch.reserve(scratch_bytes);
  }

  /// `batch` matrices below one another, as (batch, rows / batch, cols); or (rows, cols) for batch 0.
  Tensor put(const Matrix64& m, int64_t batch = 0) {
    Shape shape{m.rows, m.cols};
    if (batch > 0) shape = {batch, m.rows / batch, m.cols};
    const Tensor there = room(shape);
    OnHost here(ctx, there, /*load=*/false);
    store_doubles(*here, [&](int64_t i) { return m.data[static_cast<size_t>(i)]; });
    here.store();
    return there;
  }
  Tensor room(const Shape& shape) {
    arenas_.push_back(std::make_unique<Arena>("test"));
    tensors_.push_back(std::make_unique<Tensor>());
    arenas_.back()->add(tensors_.back().get(), dtype_, shape);
    arenas_.back()->allocate(ctx);
    return *tensors_.back();
  }
  Matrix64 get(const Tensor& there) {
    Matrix64 m(there.rows(), there.cols());
    load_doubles(m.data.data(), *OnHost(ctx, there));
    return m;
  }
  /// What the tensor holds after rounding to the dtype.
  Matrix64 rounded(const Matrix64& m) { return get(put(m)); }

  /// The root of each of `batch` matrices below one another.
  Matrix64 root(const Matrix64& a, InverseRoot args, int64_t batch = 1) {
    args.x = args.a = put(a, batch);
    inverse_root(ctx, args);
    return get(args.x);
  }
  Matrix64 orthonormal(const Matrix64& x) {
    const Tensor q = put(x);
    qr(ctx, {.q = q, .x = q});
    return get(q);
  }

  Context ctx;
  double unit;

 private:
  DType dtype_;
  std::vector<std::unique_ptr<Arena>> arenas_;
  std::vector<std::unique_ptr<Tensor>> tensors_;
};

/// The CPU, and the GPU or the executor where this binary has one, each in f32 and f64.
std::vector<Setting> settings();
std::string setting_name(const testing::TestParamInfo<Setting>& info);

/// Q diag(values) Q^T with a random orthogonal Q, in float64.
Matrix64 symmetric(const std::vector<double>& values, uint32_t seed);
bool all_nan(const Matrix64& m);
