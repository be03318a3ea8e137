// Where the time of a step goes: seconds, arithmetic and memory traffic per phase and operation. Off unless a
// Context points to a Profile; then every door (ON_DEVICE) records its call.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

/// What one call of an operation must do at least: floating-point operations (2 per multiply-add), and bytes
/// read and written when every operand moves once. Zero when nobody counted.
struct Work {
  double flops = 0;
  double bytes = 0;
};

class Profile {
 public:
  using Clock = std::chrono::steady_clock;
  struct Row {
    std::string phase;  // "forward"
    std::string op;     // "layernorm_forward"
    int64_t calls = 0;
    double seconds = 0;
    Work work;
  };
  /// Later calls belong to this phase.
  void begin_phase(const std::string& name) { phase_ = name; }
  void add(const char* op, double seconds, const Work& work);
  /// In the order of their first call.
  const std::vector<Row>& rows() const { return rows_; }
  void clear() { rows_.clear(); }

  /// Seconds that calls inside the running one have taken already: they count as theirs alone.
  double inner = 0;

 private:
  std::string phase_;
  std::vector<Row> rows_;
};

/// The work of operations that do not count theirs; each header that does overloads this for its arguments.
template <typename... Arguments>
Work work(const Arguments&...) {
  return {};
}
