#include "model/kernels/host_pool.h"

#include <algorithm>
#include <stdexcept>

namespace {
int64_t round_up(int64_t bytes) {
  return std::max<int64_t>(bytes + kAlign - 1, kAlign) / kAlign * kAlign;
}
}  // namespace

void HostPool::reserve(int64_t bytes) {
  bytes = round_up(bytes);
  for (const Chunk& chunk : chunks_)
    if (chunk.bytes >= bytes) return;
  chunks_.push_back({std::make_unique<HostBuffer>(ctx_, bytes), bytes, {}});
}

char* HostPool::take(int64_t bytes) {
  bytes = round_up(bytes);
  for (Chunk& chunk : chunks_) {
    int64_t start = 0;  // of the gap before the next block
    for (const auto& [offset, length] : chunk.taken) {
      if (offset - start >= bytes) break;
      start = offset + length;
    }
    if (chunk.bytes - start < bytes) continue;
    chunk.taken[start] = bytes;
    return chunk.memory->data() + start;
  }
  chunks_.push_back({std::make_unique<HostBuffer>(ctx_, bytes), bytes, {{0, bytes}}});
  return chunks_.back().memory->data();
}

void HostPool::give_back(const char* block) {
  for (Chunk& chunk : chunks_)
    if (block >= chunk.memory->data() && block < chunk.memory->data() + chunk.bytes) {
      chunk.taken.erase(block - chunk.memory->data());
      return;
    }
  throw std::logic_error("HostPool::give_back: not a block of this pool");
}
