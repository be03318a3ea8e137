#include "optim/assign.h"

#include <fmt/format.h>

#include <algorithm>

#include "error.h"
#include "optim/sensitivity.h"

namespace {
std::string option_of(Role role) {
  return fmt::format("--{}", role_name(role));
}

/// A rule that some option gave, for a role or a pattern.
struct Named {
  const Rule* rule;
  std::string text, by, option;
  bool used = false;
};

/// The rule of a parameter among those by role and by name, which is marked as used.
Named& choose(const Parameter& p, std::map<Role, Named>& by_role, std::vector<Named>& by_name) {
  Named* named = by_role.contains(p.role) ? &by_role[p.role] : nullptr;
  for (Named& candidate : by_name)
    if (name_matches(candidate.by, p.name)) named = &candidate, candidate.used = true;
  if (named == nullptr)
    throw UsageError(fmt::format("no rule for {}, {}, give one such as {} adam", p.name, option_of(p.role),
                                 option_of(p.role)));
  if (named->rule->matrices_only() && !p.is_matrix())
    throw UsageError(fmt::format(
        "'{}' needs matrices and {} is a vector, {}, choose adam, sgd, sign, signum, lion or scion",
        named->text, p.name, named->option));
  return *named;
}

/// Where step sizes come from: they must not exclude each other.
void check_step_sizes(Assignment& assignment, const OptimizerOptions& options) {
  if (options.sharpness > 0 && options.escape)
    throw UsageError("a step size has one source, --sharpness and --escape, choose one");
  std::optional<EscapeOptions> common;
  for (AssignedRule& row : assignment.rows) {
    const std::optional<EscapeOptions> own = row.rule->escapes();
    row.needs_anchor = own || options.escape;
    if (row.rule->hyperball() && (options.sharpness > 0 || row.parameter->init == Init::zeros))
      throw UsageError(fmt::format("hyperball needs {}, {} {}, leave hyperball out",
                                   options.sharpness > 0
                                       ? "a step size that is known before the direction, so no --sharpness"
                                       : row.parameter->name + " to begin with other values than zero",
                                   row.option, row.text));
    if (!own) continue;
    if (options.measured())
      throw UsageError(fmt::format("{} sets its own step size, {} {}, leave --sharpness and --escape out",
                                   row.text.substr(0, row.text.find(':')), row.option, row.text));
    if (common && *common != *own)
      throw UsageError(
          fmt::format("all tensors share one escape velocity, {} {}, give the same eta0, growth and "
                      "coefficient everywhere",
                      row.option, row.text));
    common = own;
  }
  assignment.velocity = options.escape ? options.escape : common;
}

/// The group of the matrices, or of the vector, that the rule of a parameter sees in one process.
Group whole_group_of(const Parameter& p) {
  return group_of(p, p.is_matrix() ? p.shape[0] / p.matrices : 0);
}
}  // namespace

Assignment assign_rules(const ParameterTable& table, const OptimizerOptions& options) {
  Assignment assignment{.rules = {}, .rows = {}, .velocity = {}, .measured = options.measured()};
  const auto named = [&](const std::string& option, const std::string& text, const std::string& by) {
    assignment.rules.push_back(make_rule(option, text));
    return Named{assignment.rules.back().get(), text, by, option};
  };
  std::map<Role, Named> by_role;
  for (const auto& [role, text] : options.rules)
    by_role[role] = named(option_of(role), text, role_name(role));
  std::vector<Named> by_name;
  for (const RuleOverride& o : options.overrides)
    by_name.push_back(named("--set '" + o.pattern + "'", o.rule, o.pattern));
  const std::vector<double> sensitivities = read_sensitivities(options.sensitivities, table);
  for (const Parameter& p : table) {
    const Named& chosen = choose(p, by_role, by_name);
    assignment.rows.push_back(
        {.parameter = &p,
         .rule = chosen.rule,
         .text = chosen.text,
         .by = chosen.by,
         .option = chosen.option,
         .sensitivity = chosen.rule->sensitivity() * sensitivities[assignment.rows.size()]});
  }
  for (const Named& candidate : by_name)
    if (!candidate.used)
      throw UsageError(
          fmt::format("no tensor has that name, {}, see the names with train_gpt info", candidate.option));
  check_step_sizes(assignment, options);
  assignment.measures_first =
      options.sharpness > 0 &&
      (options.grad_clip == 0 || std::ranges::all_of(assignment.rows, [](const AssignedRule& row) {
         return row.rule->scale_free(whole_group_of(*row.parameter));
       }));
  return assignment;
}

Group group_of(const Parameter& p, int64_t rows) {
  return {.shape = p.is_matrix() ? Shape{rows, p.shape[1]} : p.shape,
          .transposed = p.stored_transposed(),
          .blocks = {}};
}

Owners owners_of(const Assignment& assignment, int ranks) {
  std::vector<OwnedParameter> list;
  for (const AssignedRule& row : assignment.rows) {
    const Parameter& p = *row.parameter;
    const Group group = whole_group_of(p);
    const bool by_token = p.role == Role::embedding || p.role == Role::position || p.role == Role::head;
    list.push_back({.name = p.name,
                    .shape = p.shape,
                    .matrices = p.matrices,
                    .by_rows = by_token && p.is_matrix() && p.matrices == 1 &&
                               row.rule->rows_apart(group, assignment.measured),
                    .work = row.rule->work(group)});
  }
  return {list, ranks};
}

std::vector<StateSpec> state_of(const AssignedRule& row, const Piece& piece) {
  std::vector<StateSpec> specs = row.rule->state(group_of(*row.parameter, piece));
  if (row.rule->hyperball()) specs.push_back({.name = "radius", .shape = {}});
  return specs;
}

int64_t state_bytes_of(const AssignedRule& row, const Piece& piece) {
  const Shape& shape = row.parameter->shape;
  int64_t numbers = row.needs_anchor ? piece.rows * (shape.size() / shape[0]) : 0;
  for (const StateSpec& spec : state_of(row, piece)) numbers += spec.shape.size() * piece.matrices;
  return 4 * numbers;
}
