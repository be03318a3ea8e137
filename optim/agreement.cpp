#include "optim/agreement.h"

#include "model/kernels/reduce.h"
#include "optim/update.h"

Agreement::Agreement(Context& ctx, Arena& arena, int64_t pieces, double clip, bool measured)
    : ctx_(ctx), pieces_(pieces), clip_(clip), measured_(measured && !ctx.comm->alone()) {
  arena.add(&totals_, DType::f64, {pieces + 1});
  if (measured_) arena.add(&numbers_, DType::f64, {2});
  arena.add(&factor_, {1});
}

void Agreement::allocate() {
  readback_ = std::make_unique<Readback>(ctx_, totals_.size());
}

void Agreement::square(std::span<const Tensor> gradients) {
  sums_of_squares(ctx_, {.sums = totals_.slice(0, pieces_), .tensors = gradients});
}

void Agreement::set_factor(double limit) {
  clip_factor(ctx_, {.sums = totals_.slice(0, pieces_),
                     .limit = limit,
                     .norm = totals_.slice(pieces_, 1),
                     .scale = factor_});
}

Measured Agreement::agree(const Measured& own) {
  std::vector<Tensor> exchanged = {totals_.slice(0, pieces_)};
  exchanged.insert(exchanged.end(), shared_.begin(), shared_.end());
  if (measured_) {
    OnHost numbers(ctx_, numbers_, /*load=*/false);
    numbers->f64()[0] = own.dual, numbers->f64()[1] = own.along;
    numbers.store();
    exchanged.push_back(numbers_);
  }
  ctx_.comm->finish(ctx_.comm->start_sum(exchanged));
  set_factor(clip_);
  readback_->fetch(totals_);
  if (!measured_) return own;
  const OnHost sums(ctx_, numbers_);
  return {.dual = sums->f64()[0], .along = sums->f64()[1]};
}

Measured Agreement::total(const Measured& own) const {
  double sums[] = {own.dual, own.along};
  ctx_.comm->sum(sums);
  return {.dual = sums[0], .along = sums[1]};
}

double Agreement::factor_here() const {
  return *OnHost(ctx_, factor_)->f32();
}
