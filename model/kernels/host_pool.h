// Page-locked host memory that exchanges take and give back in any order.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "model/kernels/stream.h"

class HostPool {
 public:
  explicit HostPool(const Context& ctx) : ctx_(ctx) {}

  /// Makes room for `bytes` in one run.
  void reserve(int64_t bytes);
  /// `bytes` of memory aligned to kAlign, from a new chunk when no old one has room.
  char* take(int64_t bytes);
  void give_back(const char* block);

 private:
  struct Chunk {
    std::unique_ptr<HostBuffer> memory;
    int64_t bytes;
    std::map<int64_t, int64_t> taken;  // offset -> bytes
  };
  const Context& ctx_;
  std::vector<Chunk> chunks_;
};
