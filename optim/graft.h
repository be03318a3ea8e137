// Grafting: a rule keeps its direction and takes the length of another's (Agarwal et al., arXiv 2002.11803).
//
//   u <- u ||a||_F / ||u||_F,   0 / 0 = 0,   with the other direction a of the gradient G at step t:
//
//   graft=adam      a = G / (sqrt(v / (1 - graft_beta2^t)) + graft_eps), v the mean of G^2
//   graft=adagrad   a = G / (sqrt(v) + graft_eps), v the sum of G^2
//   graft=sgd       a = G
//   graft=none      u as it is
//
// v is state of the rule, "v" of the shape of a block, unless it is that of the newest gradient alone.
#pragma once

#include <span>
#include <string>

#include "optim/rule.h"

class Graft {
 public:
  Graft() = default;
  /// Reads the keys graft, graft_beta2 and graft_eps.
  Graft(Keyed& keys, double default_beta2);

  bool none() const { return kind_ == "none"; }
  bool keeps_v() const { return beta2_ > 0 || kind_ == "adagrad"; }
  /// to (blocks, ...) = a of every block, whose gradients stay; `v` of every block where keeps_v(), updated.
  void directions(Context& ctx, const Tensor& to, std::span<const Block> blocks, std::span<const Tensor> v,
                  const RuleStep& step) const;

 private:
  bool by_moments() const { return kind_ == "adam" || kind_ == "adagrad"; }

  std::string kind_ = "none";
  double beta2_ = 0, eps_ = 0;
};
