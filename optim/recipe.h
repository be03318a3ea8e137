// Named recipes: a rule for every role, a schedule and a clip, that are known to work together.
#pragma once

#include <span>
#include <string>

#include "optim/optimizer.h"

/// One row of the table of recipes.
struct Recipe {
  const char* name;
  const char* help;    // one line
  const char* hidden;  // rule texts per role
  const char* embedding;
  const char* position;
  const char* head;
  const char* vector;
  const char* scalar;
  const char* schedule;  // schedule text
  double grad_clip;      // 0: none
};

/// The default comes first.
std::span<const Recipe> recipe_table();
/// The options of recipe `name`; the caller then overrides what the user chose. Throws UsageError with the
/// names.
OptimizerOptions recipe_options(const std::string& name);
