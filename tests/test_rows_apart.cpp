// Which rules may be cut between rows: directions, state and measured sums of a matrix in pieces are those of
// the whole.
#include <gtest/gtest.h>

#include "tests/optim_fixture.h"

namespace {
constexpr int64_t kRows = 23;

/// A rule on one matrix, or on a piece of one; the caller gives the numbers that belong to the whole.
class Cut {
 public:
  Cut(const std::string& text, const Matrix& weight, bool transposed, UseDevice use)
      : rule_(make_rule("--embedding", text)) {
    use(ctx_);
    const Shape shape{weight.rows, weight.cols};
    group_ = {.shape = shape, .transposed = transposed, .blocks = {}};
    specs_ = rule_->state(group_);
    Block block{.weight = {}, .grad = {}, .state = std::vector<Tensor>(specs_.size())};
    for (Tensor* tensor : {&block.weight, &block.grad, &block.anchor}) arena_.add(tensor, shape);
    for (size_t i = 0; i < specs_.size(); ++i) arena_.add(&block.state[i], specs_[i].shape);
    arena_.add(&scale_, {1});
    arena_.allocate(ctx_);
    upload(ctx_, block.weight, weight);
    upload(ctx_, block.anchor, weight);
    group_.blocks.push_back(block);
    ctx_.scratch.reserve(std::max(rule_->scratch_bytes(ctx_, group_), whole_scratch_bytes()));
  }

  struct Given {
    int64_t t;
    float scale;  // of clipping
    bool measured;
  };
  /// One step; returns what the rule measured.
  Measured step(const Matrix& grad, const Given& given) {
    upload(ctx_, block().grad, grad);
    Matrix scale(1, 1);
    scale.data[0] = given.scale;
    upload(ctx_, scale_, scale);
    RuleStep step{.t = given.t, .grad_scale = scale_, .clips = true, .measure = given.measured, .lr = 0.01};
    step.eta = step.next_eta = step.first_eta = 0.5;
    Measured sums;
    if (rule_->escapes()) sums = rule_->prepare(ctx_, group_, step);
    sums += rule_->direction(ctx_, group_, step);
    apply_update(ctx_, {.w = block().weight,
                        .u = block().grad,
                        .step = 0.01,
                        .decay = 0.001,
                        .cautious = rule_->cautious()});
    return sums;
  }
  Matrix weight() { return download(ctx_, block().weight); }
  Matrix state(size_t i) { return download(ctx_, block().state[i]); }
  size_t states() const { return specs_.size(); }

 private:
  Block& block() { return group_.blocks[0]; }

  Context ctx_;
  std::unique_ptr<Rule> rule_;
  Group group_;
  std::vector<StateSpec> specs_;
  Arena arena_{"rule"};
  Tensor scale_;
};

Matrix rows_of(const Matrix& m, int64_t first, int64_t rows) {
  Matrix part(rows, m.cols);
  std::copy_n(m.data.begin() + first * m.cols, rows * m.cols, part.data.begin());
  return part;
}

/// All rules as they come, and with the keys that decide whether rows are apart.
std::vector<std::string> many_rules() {
  std::vector<std::string> list;
  for (const RuleEntry& entry : rule_table()) list.push_back(entry.name);
  for (const char* name :
       {"frobenius", "rms", "l1-linf", "scaled-l1-linf", "l2-l2", "nuclear", "l1-rms", "l1-l1", "l1-l2",
        "l1-l1.5", "l1-linf", "rms-linf", "l2-linf", "l3-linf", "linf-linf"}) {
    list.push_back(std::string("steepest:momentum=0.9,nesterov=1,norm=") + name);
    list.push_back(std::string("scion:radius=3,constrained=1,norm=") + name);
  }
  for (const char* text :
       {"adam:hyperball=1", "adam:beta1=0", "adam:beta2=0,eps=0,bias_correction=0",
        "sgd:momentum=0.9,nesterov=1", "sgd:normalize=1", "sign:cautious=1", "colnorm:momentum=0.5",
        "rownorm:momentum=0.5", "prodigy:variant=no-ema", "prodigy:beta2=0",
        "prodigy:variant=package,beta2=0", "prodigy:variant=package", "lion:beta1=0.5"})
    list.push_back(text);
  return list;
}

bool rows_apart(const std::string& text, bool transposed, bool measured) {
  return make_rule("--embedding", text)
      ->rows_apart({.shape = {kRows, 16}, .transposed = transposed, .blocks = {}}, measured);
}

/// Bit for bit where rows fill vector registers: in what is left over the compiler may fuse a product and a
/// sum that it does not fuse elsewhere.
void expect_rows(const Matrix& piece, const Matrix& rows) {
  if (rows.cols % 16 == 0)
    EXPECT_EQ(piece.data, rows.data);
  else
    EXPECT_LT(deviation(piece, rows), 1e-6);
}

struct Way {
  bool transposed, measured;
  int64_t cols;
};

/// Several steps of the whole and of three pieces, of one, five and the other rows.
void check_pieces(const std::string& text, const Way& way, UseDevice use) {
  const auto [transposed, measured, cols] = way;
  SCOPED_TRACE(text + (transposed ? ", transposed" : "") + (measured ? ", measured" : ""));
  const Matrix weight = random_matrix(kRows, cols, 1);
  Cut whole(text, weight, transposed, use);
  const std::vector<std::pair<int64_t, int64_t>> ranges = {{0, 1}, {1, 5}, {6, kRows - 6}};
  std::vector<std::unique_ptr<Cut>> pieces;
  for (const auto& [first, rows] : ranges)
    pieces.push_back(std::make_unique<Cut>(text, rows_of(weight, first, rows), transposed, use));
  for (int64_t t = 1; t <= 4; ++t) {
    Matrix grad = random_matrix(kRows, cols, static_cast<uint32_t>(10 + t), 0.1f);
    std::fill_n(grad.data.begin(), cols, 0.0f);  // an absent token
    const Cut::Given given{.t = t, .scale = t == 2 ? 0.5f : 1, .measured = measured};
    const Measured want = whole.step(grad, given);
    Measured sums;
    for (size_t i = 0; i < pieces.size(); ++i)
      sums += pieces[i]->step(rows_of(grad, ranges[i].first, ranges[i].second), given);
    EXPECT_NEAR(sums.dual, want.dual, 1e-6 * want.dual);  // norms of rows are float32
    EXPECT_NEAR(sums.along, want.along, 1e-6 * std::fabs(want.dual) + 1e-9);
  }
  for (size_t i = 0; i < pieces.size(); ++i) {
    const auto& [first, rows] = ranges[i];
    expect_rows(pieces[i]->weight(), rows_of(whole.weight(), first, rows));
    for (size_t k = 0; k < whole.states(); ++k)
      expect_rows(pieces[i]->state(k), rows_of(whole.state(k), first, rows));
  }
}
}  // namespace

TEST(RowsApart, PiecesAreTheWhole) {
  int cut = 0;
  for (const std::string& text : many_rules())
    for (const bool transposed : {false, true})
      for (const bool measured : {false, true}) {
        if (!rows_apart(text, transposed, measured)) continue;
        ++cut;
        for (const UseDevice use : both_devices())
          for (const int64_t cols : {16, 10}) check_pieces(text, {transposed, measured, cols}, use);
      }
  EXPECT_GT(cut, 50);
}

TEST(RowsApart, WhichRules) {
  struct Case {
    const char* text;
    bool as_stored, transposed, measured;  // measured: of the one of the two that is apart
  };
  for (const Case& c : {Case{"adam", true, true, true},
                        {"adam:hyperball=1", false, false, false},
                        {"sign", true, true, true},
                        {"signum", true, true, true},
                        {"lion", true, true, true},
                        {"sgd", true, true, false},  // a measured step divides by ||g||
                        {"sgd:momentum=0.9", true, true, false},
                        {"sgd:normalize=1", false, false, false},
                        {"colnorm", false, true, true},
                        {"colnorm:norm=l1-l1.5", false, true, true},
                        {"rownorm", true, false, true},
                        {"rownorm:hyperball=1", false, false, false},
                        {"scion:norm=l1-linf", true, true, true},
                        {"scion:norm=scaled-l1-linf", true, false, true},
                        {"scion", false, false, false},
                        {"steepest", false, false, false},
                        {"steepest:norm=nuclear", false, false, false},
                        {"prodigy", false, false, false},  // r
                        {"prodigy:variant=no-ema", true, true, true},
                        {"muon", false, false, false},
                        {"normuon", false, false, false},
                        {"dion", false, false, false},
                        {"shampoo", false, false, false},
                        {"oneside", false, false, false},
                        {"soap", false, false, false}}) {
    EXPECT_EQ(rows_apart(c.text, false, false), c.as_stored) << c.text;
    EXPECT_EQ(rows_apart(c.text, true, false), c.transposed) << c.text;
    EXPECT_EQ(rows_apart(c.text, c.transposed, true), c.measured) << c.text;
  }
}

TEST(RuleWork, NewtonSchulzByItsOwnSteps) {
  const auto gigaflops = [](const char* text, int64_t rows, int64_t cols) {
    return make_rule("--hidden", text)->work({.shape = {rows, cols}, .blocks = {}}) / 1e9;
  };
  EXPECT_NEAR(gigaflops("muon", 768, 768), 13.6, 0.05);
  EXPECT_NEAR(gigaflops("muon", 3072, 768), 40.8, 0.05);
  EXPECT_NEAR(gigaflops("muon", 768, 3072), 40.8, 0.05);
  EXPECT_DOUBLE_EQ(gigaflops("muon:steps=10", 96, 64), 2 * gigaflops("muon", 96, 64));
  EXPECT_DOUBLE_EQ(gigaflops("normuon", 96, 64), gigaflops("muon", 96, 64));
  EXPECT_DOUBLE_EQ(gigaflops("muon:ns=polar-express8", 96, 64), 1.6 * gigaflops("muon", 96, 64));
  EXPECT_DOUBLE_EQ(gigaflops("muon:ns=cubic5", 64, 64), 4.0 / 6 * gigaflops("muon", 64, 64));  // two of three
}

/// Products cost more than passes over memory, and more where more of them are asked for.
TEST(RuleWork, Ordered) {
  const auto work = [](const std::string& text, int64_t n = 256) {
    return make_rule("--hidden", text)->work({.shape = {n, n}, .blocks = {}});
  };
  for (const RuleEntry& entry : rule_table()) {
    EXPECT_GE(work(entry.name), work("sign")) << entry.name;
    EXPECT_GT(work(entry.name, 512), work(entry.name)) << entry.name;
    if (make_rule("--hidden", entry.name)->matrices_only() && std::string(entry.name) != "colnorm" &&
        std::string(entry.name) != "rownorm") {
      EXPECT_GT(work(entry.name), 10 * work("adam")) << entry.name;
    }
  }
  EXPECT_GT(work("shampoo:freq=1"), work("shampoo"));
  EXPECT_GT(work("shampoo"), work("shampoo:block=64"));
  EXPECT_GT(work("shampoo:sides=both,freq=1"), work("oneside"));
  EXPECT_GT(work("shampoo:root=newton,freq=1"), work("shampoo:freq=1"));
  EXPECT_GT(work("soap:freq=1"), work("soap"));
  EXPECT_GT(work("soap"), work("soap:max_side=8"));
  EXPECT_GT(work("dion:rank=128"), work("dion:rank=8"));
  EXPECT_GT(work("muon:ns=svd"), work("muon:ns=sketch:rank=4"));
  EXPECT_GT(work("muon:ns=newton"), work("muon:ns=newton,steps=5"));
  EXPECT_GT(work("steepest:norm=nuclear"), work("steepest:norm=l1-linf"));
}
