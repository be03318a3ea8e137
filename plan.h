// What a run will take, said before any of it is taken.
#pragma once

#include "model/gpt.h"
#include "optim/optimizer.h"
#include "optim/telemetry.h"
#include "options.h"

/// Prints one screen: device, sizes, the memory plan, and the largest batch that would fit.
void print_plan(const TrainOptions& options, const Gpt& model, const Optimizer& optimizer,
                const Telemetry& telemetry);

/// RunError when the plan is larger than the memory: better now than killed in the middle of a step.
void expect_memory(const TrainOptions& options, const Gpt& model, const Optimizer& optimizer,
                   const Telemetry& telemetry);
