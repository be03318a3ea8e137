// One kernel launch for many tensors, for .cu files. A launch carries a table of its tensors by value; every
// block looks up which chunk of which tensor it has.
//
//   struct Entry { float* x; int64_t n; bool wide; };            // wide: may be accessed four at a time
//   __global__ void __launch_bounds__(kChunkThreads) kernel(const __grid_constant__ ChunkTable<Entry> table)
//   {
//     const Chunk chunk = chunk_of_block(table);
//     const Entry& a = table.entries[chunk.index];
//     for_packs(chunk, a.wide, [&](int64_t i, auto width) { ... elements i .. i + width - 1 ... });
//   }
//   for_chunk_tables<Entry>(entries, [&](const ChunkTable<Entry>& table, unsigned blocks) {
//     launch(ctx, {.grid = blocks, .block = kChunkThreads}, kernel, table);
//   });
#pragma once

#include <span>

#include "model/kernels/cuda.h"

inline constexpr int kChunkThreads = 256;
inline constexpr int64_t kChunk = 8192;  // elements of a tensor that one block takes

template <typename Entry>
struct ChunkTable {
  /// Parameters of a launch may take 4 KiB on sm_80; the rest is for other arguments.
  static constexpr int kMost = static_cast<int>((4096 - 128) / (sizeof(Entry) + sizeof(unsigned)));
  int count;
  unsigned end[kMost];  // blocks of tensors 0 .. i
  Entry entries[kMost];
};

/// Calls body(table, blocks) for as many tables as it takes to list all entries.
template <typename Entry, typename Body>
void for_chunk_tables(std::span<const Entry> entries, Body&& body) {
  for (size_t first = 0; first < entries.size(); first += ChunkTable<Entry>::kMost) {
    ChunkTable<Entry> table{};
    unsigned blocks = 0;
    for (size_t i = first; i < entries.size() && table.count < ChunkTable<Entry>::kMost; ++i) {
      blocks += blocks_for(entries[i].n, kChunk);
      table.end[table.count] = blocks;
      table.entries[table.count++] = entries[i];
    }
    body(table, blocks);
  }
}

/// True when all of these tensors (absent ones count as well) may be accessed four elements at a time.
template <typename... Tensors>
bool aligned_for_four(const Tensors&... tensors) {
  return (
      (reinterpret_cast<uintptr_t>(tensors.data) % (4 * static_cast<uint64_t>(dtype_bytes(tensors.dtype))) ==
       0) &&
      ...);
}

struct Chunk {
  int index;           // of the tensor in the table
  int64_t begin, end;  // elements
};

template <typename Entry>
__device__ __forceinline__ Chunk chunk_of_block(const ChunkTable<Entry>& table) {
  int low = 0, high = table.count - 1;  // the first tensor whose end is beyond this block
  while (low < high) {
    const int middle = (low + high) / 2;
    if (table.end[middle] > blockIdx.x)
      high = middle;
    else
      low = middle + 1;
  }
  const int64_t begin = int64_t{blockIdx.x - (low > 0 ? table.end[low - 1] : 0)} * kChunk;
  const int64_t n = table.entries[low].n;
  return {low, begin, begin + kChunk < n ? begin + kChunk : n};
}

/// Number of elements that a body of for_packs gets at once, as a type.
template <int N>
struct Width {
  static constexpr int value = N;
};

/// Calls body(i, Width<4>) and body(i, Width<1>) so that this block's threads cover the chunk once.
template <typename Body>
__device__ __forceinline__ void for_packs(const Chunk& chunk, bool wide, Body&& body) {
  int64_t rest = chunk.begin;
  if (wide) {
    rest += (chunk.end - chunk.begin) / 4 * 4;
#pragma unroll 2
    for (int64_t i = chunk.begin + 4 * int64_t{threadIdx.x}; i < rest; i += 4 * kChunkThreads)
      body(i, Width<4>{});
  }
  for (int64_t i = rest + threadIdx.x; i < chunk.end; i += kChunkThreads) body(i, Width<1>{});
}
