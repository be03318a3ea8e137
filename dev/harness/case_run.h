// One case on one device: its data, whether the result is right, and how long a run takes.
#pragma once

#include <optional>
#include <string>

#include "dev/harness/stopwatch.h"
#include "dev/harness/variants.h"

/// What results are compared with. `oracle`: the case's float64 loops, where they take seconds at most.
/// `cpu`: the CPU half in float32, for GPUs and candidates. `reference`: the plain loops of variants.cpp, for
/// the CPU half itself. `none`: nothing else is at hand at this size; the small sizes of `make test` must do.
enum class Against { oracle, cpu, reference, none };
const char* name_of(Against against);

/// The operands of a case, in host memory and where the context computes.
class CaseRun {
 public:
  /// `shipped`: the case as the door runs it. Fills all operands with random values: the same every time, for
  /// any number of threads; rounded to bf16 where the context stores bf16.
  CaseRun(Context& ctx, const OpCase& shipped);

  /// Runs the case, or the same with a candidate, and compares every output element with the reference:
  /// |got - want| <= tolerance (|want| + rms(want)). Empty when right, else what is wrong.
  std::string check(const OpCase& op_case, bool is_candidate);
  /// What check() compares with.
  Against against(bool is_candidate) const;

  /// Seconds of one run that begins with the same values as every other, and with cold caches.
  double seconds(const OpCase& op_case, Stopwatch& stopwatch);

  /// What one run must do at least, as the operation counts it (profile.h).
  Work work();

 private:
  void fill();
  void round_inputs();
  /// Device operands back to their first values.
  void restore();
  const Tensors& want(Against against);
  void prepare_scratch(Context& ctx) const;

  Context& ctx_;
  OpCase shipped_;
  Context cpu_;
  Arena inputs_arena_{"inputs"}, operands_arena_{"operands"}, first_arena_{"first values"};
  Tensors inputs_;    // host, float32 and int32
  Tensors operands_;  // where ctx computes
  Tensors first_;     // the same, for operands that runs overwrite
  struct Reference {
    explicit Reference(Against against) : against(against) {}
    Against against;
    Arena arena{"reference"};
    Tensors tensors;
  };
  std::optional<Reference> reference_;
};
