// Telemetry for people and programs: the `norms` line of log.jsonl and the table at the end of a run. What
// the numbers mean is in optim/telemetry.h.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "optim/telemetry.h"

/// {"type":"norms","step":,"loss":,"loss_after":,"predicted":,"bound":,"length":,"sharpness":,
///  "tensors":{NAME:{"role":,"norm_name":,"weight":,"update":,"gradient_dual":,"alignment":,"sharpness":,
///                   "step":,"s_step":,"band":[low,high]},...}}
/// Six significant digits; null where a number is undefined; no band where there is none.
nlohmann::ordered_json norms_line(const StepNorms& norms);

/// The same as lines of text, for all tensors but vectors.
std::string norms_table(const StepNorms& norms);
