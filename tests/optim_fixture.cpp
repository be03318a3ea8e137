#include "tests/optim_fixture.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "error.h"
#include "optim/update.h"

std::string rule_message(const std::string& text) {
  try {
    make_rule("--hidden", text);
  } catch (const UsageError& error) {
    return error.what();
  }
  return "";
}

template <typename T>
MatrixOf<T> start_weight() {
  return MatrixOf<T>(optim_golden().at("W0"));
}

template <typename T>
MatrixOf<T> fixed_gradient(size_t t) {
  return MatrixOf<T>(optim_golden().at("G").at(t));
}

Matrix after_three(const std::string& rule, UseDevice use) {
  RuleDriver driver(rule, {start_weight()}, /*transposed=*/false, use);
  for (size_t t = 0; t < 3; ++t) driver.step({fixed_gradient(t)});
  return driver.weight();
}

OptimizerOptions everywhere(const std::string& matrices, const std::string& vectors) {
  OptimizerOptions options;
  for (const Role role : kRoles)
    options.rules[role] = role == Role::vector || role == Role::scalar ? vectors : matrices;
  return options;
}

std::vector<OptimizerOptions> every_rule(const std::string& keys) {
  std::vector<OptimizerOptions> list;
  for (const RuleEntry& entry : rule_table()) {
    const bool matrices_only = make_rule("--hidden", entry.name)->matrices_only();
    const std::string rule = entry.name + keys;
    list.push_back(everywhere(rule, matrices_only ? "sign" : rule));
  }
  return list;
}

std::vector<OptimizerOptions> all_options() {
  std::vector<OptimizerOptions> list = every_rule();
  for (const Recipe& recipe : recipe_table()) list.push_back(recipe_options(recipe.name));
  list.push_back(everywhere("muon:wd=0.1,cautious=1", "adam"));
  list.back().rules[Role::hidden] = "adam:hyperball=1";
  list.push_back(everywhere("spectral:momentum=0.9,ns=svd", "sgd:momentum=0.9,nesterov=1"));
  list.push_back(everywhere("steepest:momentum=0.9,wd=0.1,cautious=1", "sgd:normalize=1,momentum=0.5"));
  list.push_back(everywhere("colnorm:momentum=0.5,nesterov=1", "scion:norm=frobenius,radius=3"));
  list.push_back(everywhere("rownorm:momentum=0.5,nesterov=1", "sign"));
  list.back().sharpness = 10;
  list.back().grad_clip = 0.1;
  return list;
}

template <typename T>
RuleDriverOf<T>::RuleDriverOf(const std::string& text, const std::vector<M>& weights, bool transposed,
                              UseDevice use)
    : rule_(make_rule("--hidden", text)) {
  use(ctx_);
  if (rule_->escapes()) escape_.emplace(*rule_->escapes());
  const auto count = static_cast<int64_t>(weights.size());
  const Shape shape{weights.at(0).rows, weights.at(0).cols};
  const DType dtype = dtype_of<T>();
  group_ = {.shape = shape, .transposed = transposed, .blocks = {}, .dtype = dtype};
  auto specs = rule_->state(group_);
  if (rule_->hyperball()) specs.push_back({.name = "radius", .shape = {}});
  for (const StateSpec& spec : specs) state_names_.push_back(spec.name);
  std::vector<Tensor> states(specs.size());
  Tensor anchors;
  arena_.add(&weights_, dtype, {count, shape[0], shape[1]});
  arena_.add(&grads_, dtype, {count, shape[0], shape[1]});
  arena_.add(&anchors, dtype, {count, shape[0], shape[1]});
  for (size_t k = 0; k < specs.size(); ++k) arena_.add(&states[k], dtype, {count, specs[k].shape.size()});
  arena_.allocate(ctx_);
  for (int64_t i = 0; i < count; ++i) {
    upload(ctx_, weights_[i], weights[static_cast<size_t>(i)]);
    upload(ctx_, anchors[i], weights[static_cast<size_t>(i)]);
    Block block{.weight = weights_[i], .grad = grads_[i], .state = {}, .anchor = anchors[i]};
    for (size_t k = 0; k < specs.size(); ++k) block.state.push_back(states[k][i].view(specs[k].shape));
    group_.blocks.push_back(block);
  }
  ctx_.scratch.reserve(std::max(rule_->scratch_bytes(ctx_, group_),
                                std::max(ball_scratch_bytes(ctx_, group_), whole_scratch_bytes())));
}

template <typename T>
double RuleDriverOf<T>::step(const std::vector<M>& gradients, double sharpness) {
  for (size_t i = 0; i < gradients.size(); ++i) upload(ctx_, group_.blocks[i].grad, gradients[i]);
  RuleStep step{.t = ++t_, .measure = sharpness > 0, .lr = rule_->lr()};
  Measured measured;
  if (escape_) {
    step.eta = escape_->eta(), step.first_eta = escape_->first();
    step.lr *= step.eta;
    measured = rule_->prepare(ctx_, group_, step);
    step.next_eta = escape_->after(measured);
  }
  measured += rule_->direction(ctx_, group_, step);
  if (escape_) escape_->update(measured);
  const double lr = sharpness > 0 ? measured.dual / rule_->sensitivity() / sharpness : step.lr;
  if (rule_->hyperball()) stay_on_ball(ctx_, group_.blocks, step, lr);
  for (const Block& block : group_.blocks)
    apply_update(ctx_, {.w = block.weight,
                        .u = block.grad,
                        .step = lr / rule_->sensitivity(),
                        .decay = lr * rule_->weight_decay(),
                        .cautious = rule_->cautious()});
  return lr;
}

template <typename T>
const Tensor& RuleDriverOf<T>::state(const std::string& name) {
  const auto at = std::ranges::find(state_names_, name) - state_names_.begin();
  return group_.blocks[0].state.at(static_cast<size_t>(at));
}

template class RuleDriverOf<float>;
template class RuleDriverOf<double>;
template Matrix start_weight<float>();
template Matrix64 start_weight<double>();
template Matrix fixed_gradient<float>(size_t);
template Matrix64 fixed_gradient<double>(size_t);

SmallModel::SmallModel(const OptimizerOptions& options, UseDevice use, int64_t C, std::shared_ptr<Comm> comm)
    : RankContext(std::move(comm)),
      config{.name = "small", .L = 2, .NH = 1, .C = C, .positions = 24, .V = 37},
      table(config),
      optimizer(ctx, table, options) {
  use(ctx);
  table.allocate(ctx, /*with_gradients=*/true);
  table.initialize(7);
  optimizer.allocate();
}

void SmallModel::set_gradients(int64_t t) {
  uint32_t seed = static_cast<uint32_t>(1000 * t);
  for (const Parameter& p : table) {
    Matrix g = random_matrix(1, p.size(), ++seed, 0.01f);
    if (p.role == Role::embedding) std::fill_n(g.data.begin(), p.shape[1], 0.0f);  // an absent token
    upload(ctx, p.grad, g);
  }
}

StepReport SmallModel::step(int64_t t, int64_t total) {
  set_gradients(t);
  optimizer.step(t, total);
  return optimizer.report();
}

std::vector<float> SmallModel::weights() {
  std::vector<float> all;
  for (const Parameter& p : table) append(all, p.value);
  return all;
}

std::vector<float> SmallModel::state() {
  std::vector<float> all;
  for (const NamedTensor& tensor : optimizer.state()) append(all, tensor.value, tensor.where);
  return all;
}

void SmallModel::append(std::vector<float>& all, const Tensor& tensor, Context* where) {
  Context host;
  const Matrix m = download(where != nullptr ? *where : host, tensor);
  all.insert(all.end(), m.data.begin(), m.data.end());
}
