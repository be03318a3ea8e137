#include "model/kernels/comm_exchange.h"

#include <algorithm>
#include <array>
#include <cstring>

void check_parts(Collective exchange, std::span<const Part> parts, int ranks) {
  for (const Part& part : parts) {
    const bool summed = exchange != Collective::all_gather;
    if (part.tensor.dtype == DType::i32 || (summed && part.tensor.dtype == DType::bf16))
      throw ShapeError(std::string(summed ? "sum over ranks" : "all-gather") + ": got " + part.tensor.str() +
                       ", need f32 or f64" + (summed ? "" : " or bf16"));
    if (part.tensor.size() > 0 && !part.tensor)
      throw ShapeError("exchange: a part of shape " + part.tensor.shape.str() + " has no memory");
    if (exchange != Collective::sum && (part.owner < 0 || part.owner >= ranks))
      throw ShapeError("exchange: owner " + std::to_string(part.owner) + " of a part, there are " +
                       std::to_string(ranks) + " ranks");
  }
}

int64_t bytes_sent(Collective exchange, std::span<const Part> parts, int rank, int ranks) {
  int64_t bytes = 0;
  for (const Part& part : parts) {
    const bool mine = part.owner == rank;
    const int64_t times = exchange == Collective::reduce_scatter ? (mine ? 0 : 1)
                          : exchange == Collective::sum || mine  ? ranks - 1
                                                                 : 0;
    bytes += times * part.tensor.bytes();
  }
  return bytes;
}

namespace {
/// True when `ranks` runs from the first are blocks of one size, in the order of their owners and of memory.
bool one_each(std::span<const OwnerRun> runs, int ranks) {
  if (runs.size() < static_cast<size_t>(ranks)) return false;
  for (int rank = 0; rank < ranks; ++rank) {
    const OwnerRun& run = runs[static_cast<size_t>(rank)];
    const int64_t offset = rank * runs[0].count * dtype_bytes(run.dtype);
    if (run.owner != rank || run.dtype != runs[0].dtype || run.count != runs[0].count ||
        run.data != runs[0].data + offset)
      return false;
  }
  return true;
}
}  // namespace

std::vector<OwnerRun> find_runs(std::span<const Part> parts, int ranks) {
  std::vector<OwnerRun> of_owners;
  for (const auto& [tensor, owner] : parts) {
    if (tensor.size() == 0) continue;
    auto* data = static_cast<char*>(tensor.data);
    if (!of_owners.empty()) {
      OwnerRun& last = of_owners.back();
      if (last.owner == owner && last.dtype == tensor.dtype &&
          last.data + last.count * dtype_bytes(last.dtype) == data) {
        last.count += tensor.size();
        continue;
      }
    }
    of_owners.push_back({data, tensor.dtype, tensor.size(), owner});
  }
  std::vector<OwnerRun> runs;
  for (std::span<const OwnerRun> rest = of_owners; !rest.empty();) {
    const bool equal = one_each(rest, ranks);
    runs.push_back(rest.front());
    if (equal) runs.back().owner = OwnerRun::kOneEach;
    rest = rest.subspan(equal ? static_cast<size_t>(ranks) : 1);
  }
  return runs;
}

std::vector<Parcel> cut(std::span<const Tensor> tensors, int64_t most) {
  std::vector<Parcel> parcels;
  for (const Tensor& tensor : tensors) {
    const int64_t element = dtype_bytes(tensor.dtype);
    for (int64_t done = 0; done < tensor.bytes();) {
      if (parcels.empty() || most - parcels.back().bytes < element) parcels.emplace_back();
      Parcel& parcel = parcels.back();
      const int64_t room = (most - parcel.bytes) / element * element;
      const int64_t bytes = std::min(room, tensor.bytes() - done);
      parcel.stretches.push_back({static_cast<char*>(tensor.data) + done, bytes, tensor.dtype});
      parcel.bytes += bytes;
      done += bytes;
    }
  }
  return parcels;
}

char* in_one_run(const Parcel& parcel) {
  char* next = parcel.stretches.front().data;
  for (const Stretch& stretch : parcel.stretches) {
    if (stretch.data != next) return nullptr;
    next += stretch.bytes;
  }
  return parcel.stretches.front().data;
}

void pack(const Parcel& parcel, char* to) {
  for (const Stretch& stretch : parcel.stretches) {
    std::memcpy(to, stretch.data, static_cast<size_t>(stretch.bytes));
    to += stretch.bytes;
  }
}

void unpack(const Parcel& parcel, const char* from) {
  for (const Stretch& stretch : parcel.stretches) {
    std::memcpy(stretch.data, from, static_cast<size_t>(stretch.bytes));
    from += stretch.bytes;
  }
}

namespace {
/// A block at a time, so that the sum stays in the cache.
template <typename T>
void add_stretch(const Stretch& stretch, int64_t offset, std::span<char* const> copies) {
  std::array<T, 1024> sum, next;
  for (int64_t done = 0; done < stretch.bytes;) {
    const auto bytes = std::min<int64_t>(sizeof sum, stretch.bytes - done);
    const auto count = bytes / int64_t{sizeof(T)};
    char* here = stretch.data + done;
    const auto load = [&](size_t rank, std::array<T, 1024>& to) {
      std::memcpy(to.data(), copies[rank] != nullptr ? copies[rank] + offset + done : here,
                  static_cast<size_t>(bytes));
    };
    load(0, sum);
    for (size_t rank = 1; rank < copies.size(); ++rank) {
      load(rank, next);
      T *a = sum.data(), *b = next.data();
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) a[i] += b[i];
    }
    std::memcpy(here, sum.data(), static_cast<size_t>(bytes));
    done += bytes;
  }
}
}  // namespace

void add_in_order(const Parcel& parcel, std::span<char* const> copies) {
  int64_t offset = 0;
  for (const Stretch& stretch : parcel.stretches) {
    if (stretch.dtype == DType::f64)
      add_stretch<double>(stretch, offset, copies);
    else
      add_stretch<float>(stretch, offset, copies);
    offset += stretch.bytes;
  }
}
