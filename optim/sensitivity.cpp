#include "optim/sensitivity.h"

#include <fmt/format.h>
#include <fnmatch.h>

#include <charconv>
#include <cmath>
#include <map>

#include "error.h"
#include "keyed.h"

namespace {
constexpr const char* kOption = "--sensitivity";

/// How many matrices or vectors a role has.
std::map<Role, int> count_parts(const ParameterTable& table) {
  std::map<Role, int> parts;
  for (const Parameter& p : table) parts[p.role] += p.matrices;
  return parts;
}

/// s of every row by masses.
std::vector<double> from_masses(const std::string& text, const ParameterTable& table) {
  Keyed keys(kOption, text);
  const std::map<Role, double> defaults = {{Role::embedding, 0.5}, {Role::position, 0.5}, {Role::hidden, 5},
                                           {Role::head, 1},        {Role::vector, 1},     {Role::scalar, 1}};
  std::map<Role, double> masses;
  for (const Role role : kRoles) masses[role] = keys.number(role_name(role), defaults.at(role), 1e-9, 1e9);
  const double residual = keys.number("residual", 1, 1e-9, 1e9), qkv = keys.number("qkv", 1, 1e-9, 1e9);
  keys.finish();
  const std::map<Role, int> parts = count_parts(table);
  if (!parts.contains(Role::head)) masses[Role::embedding] += masses[Role::head];  // tied
  double total = 0;
  for (const auto& [role, count] : parts) total += masses[role];
  std::vector<double> s;
  for (const Parameter& p : table) {
    double carried = p.role == Role::hidden ? residual : 1;
    if (p.matrices > 1) carried *= qkv;
    s.push_back(carried * total * parts.at(p.role) / masses[p.role]);
  }
  return s;
}

/// Multiplies `s` of the rows that "PATTERN=VALUE" names.
void multiply_named(const std::string& text, const ParameterTable& table, std::vector<double>& s) {
  const size_t equals = text.rfind('=');
  double value = 0;
  const char* end = text.data() + text.size();
  if (equals == std::string::npos || equals == 0 ||
      std::from_chars(text.data() + equals + 1, end, value).ptr != end || !(value > 0) || std::isinf(value))
    throw UsageError(fmt::format(
        "'{}' is no sensitivity, {}, write PATTERN=VALUE with a value > 0, or masses:...", text, kOption));
  const std::string pattern = text.substr(0, equals);
  bool any = false;
  for (size_t i = 0; i < s.size(); ++i)
    if (name_matches(pattern, table.rows()[i].name)) s[i] *= value, any = true;
  if (!any)
    throw UsageError(
        fmt::format("'{}' matches no tensor, {}, see the names with train_gpt info", pattern, kOption));
}
}  // namespace

bool name_matches(const std::string& pattern, const std::string& name) {
  return fnmatch(pattern.c_str(), name.c_str(), 0) == 0 ||
         fnmatch((pattern + ".weight").c_str(), name.c_str(), 0) == 0;
}

std::vector<double> read_sensitivities(const std::vector<std::string>& texts, const ParameterTable& table) {
  std::vector<double> s(table.rows().size(), 1);
  for (const std::string& text : texts) {
    if (text != "masses" && !text.starts_with("masses:")) {
      multiply_named(text, table, s);
      continue;
    }
    const std::vector<double> by_mass = from_masses(text, table);
    for (size_t i = 0; i < s.size(); ++i) s[i] *= by_mass[i];
  }
  return s;
}
