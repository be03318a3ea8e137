#include "model/kernels/context.h"

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <stdexcept>

namespace {
constexpr int64_t kAlign = 64;  // one AVX-512 register, one cache line
constexpr int64_t kHugePage = int64_t{2} << 20;

int64_t round_up(int64_t bytes, int64_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

/// Zero-filled pages straight from the kernel. Large blocks ask for huge pages: matrix products walk over
/// hundreds of megabytes and 4 KiB pages would miss the TLB on every row.
void* map_pages(int64_t bytes, const char* what) {
  const auto size = static_cast<size_t>(round_up(bytes, kHugePage));
  void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED)
    throw std::runtime_error("not enough memory for " + std::string(what) + ", " +
                             std::to_string(bytes >> 20) + " MiB, use a smaller model or batch");
  madvise(base, size, MADV_HUGEPAGE);
  return base;
}

void unmap_pages(void* base, int64_t bytes) {
  if (base != nullptr) munmap(base, static_cast<size_t>(round_up(bytes, kHugePage)));
}
}  // namespace

Scratch::~Scratch() {
  unmap_pages(base_, capacity_);
}

void Scratch::reserve(int64_t bytes) {
  if (bytes <= capacity_) return;
  if (used_ != 0) throw std::logic_error("Scratch::reserve: a frame is open");
  unmap_pages(base_, capacity_);
  base_ = nullptr;
  base_ = static_cast<char*>(map_pages(bytes, "scratch"));
  capacity_ = bytes;
}

void* Scratch::take(int64_t bytes) {
  const int64_t end = used_ + round_up(bytes, kAlign);
  if (end > capacity_)
    throw std::logic_error("scratch too small: an operation needs " + std::to_string(end) + " bytes, " +
                           std::to_string(capacity_) + " are reserved");
  void* block = base_ + used_;
  used_ = end;
  high_water_ = std::max(high_water_, used_);
  return block;
}

void use_cpu(Context& ctx, int threads) {
  ctx.where = Where::cpu;
  ctx.threads = threads > 0 ? threads : omp_get_num_procs();
  omp_set_num_threads(ctx.threads);  // oneDNN follows OpenMP's setting
}

Arena::~Arena() {
  unmap_pages(base_, bytes_);
}

void Arena::add(Tensor* tensor, DType dtype, Shape shape) {
  if (base_ != nullptr) throw std::logic_error("Arena::add after allocate: " + name_);
  *tensor = Tensor(nullptr, dtype, shape);
  entries_.push_back({tensor, bytes_});
  bytes_ += round_up(tensor->bytes(), kAlign);
}

void Arena::allocate(Context&) {
  if (base_ != nullptr || bytes_ == 0) return;
  base_ = map_pages(bytes_, name_.c_str());
  for (const Entry& entry : entries_) entry.tensor->data = static_cast<char*>(base_) + entry.offset;
}
