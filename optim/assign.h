// Which rule moves which tensor, what sets the step sizes, and what each piece of a tensor keeps as state:
// all that is known of an optimizer before it has memory.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "model/parameters.h"
#include "optim/owners.h"
#include "optim/rule.h"
#include "optim/schedule.h"

/// A rule for the tensors of some name, before that of their role: "h.*.mlp.c_proj" -> "muon:lr=0.04".
struct RuleOverride {
  std::string pattern;  // name_matches() in sensitivity.h
  std::string rule;
};

struct OptimizerOptions {
  std::map<Role, std::string>
      rules;  // role -> "NAME:key=value,..."; a role that the model has must be present
  std::vector<RuleOverride> overrides = {};     // the last one that matches holds
  std::vector<std::string> sensitivities = {};  // read_sensitivities()
  Schedule schedule = {};
  double grad_clip = 0;  // largest global gradient norm; 0: no clipping
  double sharpness = 0;  // lambda of Proposition 7; 0: the step size is each rule's lr. When > 0 the
                         // rules' lr are not used: eta comes from the dual norms of the gradient
  std::optional<EscapeOptions> escape = {};  // eta is the escape velocity, the rules' lr are not used either

  /// True when directions are measured at every step: RuleStep::measure.
  bool measured() const { return sharpness > 0 || escape.has_value(); }
};

/// The rule of one parameter.
struct AssignedRule {
  const Parameter* parameter;
  const Rule* rule;
  std::string text, by;       // of the rule, and what gave it: a role or a pattern
  std::string option;         // the same as the user wrote it: "--hidden", "--set 'h.*'"
  double sensitivity;         // of the rule and of options.sensitivities
  bool needs_anchor = false;  // the weight before the first step, for an escape velocity
};

struct Assignment {
  std::vector<std::unique_ptr<Rule>> rules;
  std::vector<AssignedRule> rows;         // in the order of the table
  std::optional<EscapeOptions> velocity;  // of --escape, or of rules that escape by themselves
  bool measured;                          // OptimizerOptions::measured()
  // Under a sharpness several ranks make directions before they agree() on the clip factor, with a copy of
  // their state aside: agreement.h. One process knows the factor at once.
  bool measures_first = false;
};

/// Throws UsageError for a bad rule, a missing role, a pattern without a tensor, a rule that needs matrices
/// given to vectors, or step sizes that exclude each other. `table` must outlive the result.
Assignment assign_rules(const ParameterTable& table, const OptimizerOptions& options);

/// Who owns what among so many ranks.
Owners owners_of(const Assignment& assignment, int ranks);

/// The group that blocks of so many rows of a parameter belong to, without any blocks yet.
Group group_of(const Parameter& p, int64_t rows);
/// The same for the blocks of a piece.
inline Group group_of(const Parameter& p, const Piece& piece) {
  return group_of(p, piece.rows / piece.matrices);
}
/// State per block of a piece, what the optimizer itself keeps included; without the anchor.
std::vector<StateSpec> state_of(const AssignedRule& row, const Piece& piece);
/// Bytes of the state of a piece, with the anchor.
int64_t state_bytes_of(const AssignedRule& row, const Piece& piece);
