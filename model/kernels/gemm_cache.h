// The file that remembers how matrix products are computed (gemm.h), so that a run chooses as the last did.
#pragma once

#include <map>
#include <string>

#include "model/kernels/gemm.h"

struct GemmPlan {
  bool fused = true;  // by the library, epilogue and all; otherwise a plain product and our kernels
  GemmAlgorithm algorithm = {};  // when fused
  bool operator==(const GemmPlan&) const = default;
};

/// By a text that says all that the choice may depend on.
using GemmPlans = std::map<std::string, GemmPlan>;

/// The plans in the file, if it was written for this GPU and library; otherwise none, and a line on standard
/// error unless there is no file at all.
GemmPlans load_gemm_plans(const std::string& path, const std::string& gpu, const std::string& library);

/// Writes these plans, and those of other products that the file holds; under a temporary name first, so that
/// readers see the old file or the new one. False, and a line on standard error, when that fails.
bool save_gemm_plans(const std::string& path, const std::string& gpu, const std::string& library,
                     GemmPlans plans);
