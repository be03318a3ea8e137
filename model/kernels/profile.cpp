#include "model/kernels/profile.h"

#include <algorithm>

void Profile::add(const char* op, double seconds, const Work& work) {
  auto row = std::ranges::find_if(rows_, [&](const Row& r) { return r.phase == phase_ && r.op == op; });
  if (row == rows_.end()) row = rows_.insert(rows_.end(), Row{.phase = phase_, .op = op, .work = {}});
  ++row->calls;
  row->seconds += seconds;
  row->work.flops += work.flops;
  row->work.bytes += work.bytes;
}
