// How reduce.cu cuts its sums into parts: the sizes that scratch depends on. Shared with reduce.cpp, which
// plans scratch in every build.
#pragma once

#include <cstdint>

inline constexpr int64_t kSumChunk = 8192;   // elements of a tensor or of a row that one block adds up
inline constexpr int64_t kShortRow = 2048;   // rows up to this length are one warp's
inline constexpr int64_t kSlabRows = 256;    // rows of which one block adds up 32 columns
inline constexpr int64_t kWholeParts = 512;  // blocks for a whole tensor whose sum is wanted on the host

inline int64_t parts_of(int64_t n, int64_t part) {
  return (n + part - 1) / part;
}
