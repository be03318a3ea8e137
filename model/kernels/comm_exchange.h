// What an exchange is, apart from who carries it: the checks and the volumes that all communicators share,
// and, for those that move bytes between processes themselves, lists of tensors cut into parcels.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model/kernels/comm.h"

/// What happens to the parts; a broadcast is an all-gather of one part.
enum class Collective : uint8_t { sum, reduce_scatter, all_gather };

/// Throws ShapeError unless every part is f32, bf16 or f64, is not bf16 where it would be summed, has memory
/// when it has elements, and has an owner (which a sum leaves alone).
void check_parts(Collective exchange, std::span<const Part> parts, int ranks);
/// Bytes that `rank` sends to others, as comm.h says.
int64_t bytes_sent(Collective exchange, std::span<const Part> parts, int rank, int ranks);

/// Parts that one call of a library for communication can take.
struct OwnerRun {
  static constexpr int kOneEach = -1;
  char* data;
  DType dtype;
  int64_t count;  // elements
  int owner;      // or kOneEach: N blocks of `count` elements, the first one rank 0's, the next rank 1's, ...
};
/// Joins parts of one owner that follow each other in the list and in memory, then joins what is equal for
/// every rank in turn. What is empty is left out.
std::vector<OwnerRun> find_runs(std::span<const Part> parts, int ranks);

/// A run of whole elements of one tensor.
struct Stretch {
  char* data;
  int64_t bytes;
  DType dtype;
};

/// What one message carries.
struct Parcel {
  std::vector<Stretch> stretches;
  int64_t bytes = 0;
};

/// The tensors one after the other, as parcels of up to `most` bytes (8 and more). Where the cuts are depends
/// on shapes and types alone, so sender and receiver agree.
std::vector<Parcel> cut(std::span<const Tensor> tensors, int64_t most);
/// Where the parcel lies when that is one run of memory; else null.
char* in_one_run(const Parcel& parcel);
/// Copies the parcel's memory to and from one run of `parcel.bytes` bytes.
void pack(const Parcel& parcel, char* to);
void unpack(const Parcel& parcel, const char* from);
/// parcel <- ((x_0 + x_1) + x_2) + ..., each x_r a packed copy of the parcel, in the type of the tensor; null
/// stands for what the parcel holds itself. f32 and f64; copies may lie at any address.
void add_in_order(const Parcel& parcel, std::span<char* const> copies);
