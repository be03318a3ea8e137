#include "model/kernels/context.h"

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <stdexcept>

namespace {
constexpr int64_t kHugePage = int64_t{2} << 20;

int64_t round_up(int64_t bytes, int64_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

/// Zero-filled pages straight from the kernel. Large blocks ask for huge pages: matrix products walk over
/// hundreds of megabytes and 4 KiB pages would miss the TLB on every row.
char* map_pages(int64_t bytes, const char* what) {
  const auto size = static_cast<size_t>(round_up(bytes, kHugePage));
  void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED)
    throw std::runtime_error("not enough memory for " + std::string(what) + ", " +
                             std::to_string(bytes >> 20) + " MiB, use a smaller model or batch");
  madvise(base, size, MADV_HUGEPAGE);
  return static_cast<char*>(base);
}
}  // namespace

Memory::Memory(const Context& ctx, int64_t bytes, const char* what) : bytes_(bytes), device_(ctx.device) {
  if (bytes == 0) return;
  if constexpr (kHaveGpu)
    if (device_) {
      data_ = gpu::allocate(*device_, bytes, what);
      return;
    }
  data_ = map_pages(bytes, what);
}

Memory::~Memory() {
  if (data_ == nullptr) return;
  if constexpr (kHaveGpu)
    if (device_) {
      gpu::release(*device_, data_);
      return;
    }
  munmap(data_, static_cast<size_t>(round_up(bytes_, kHugePage)));
}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(device_, other.device_);
  return *this;
}

void Scratch::reserve(int64_t bytes) {
  bytes += kMostArrays * kAlign;
  if (bytes <= capacity_) return;
  if (used_ != 0) throw std::logic_error("Scratch::reserve: a frame is open");
  memory_ = {};
  memory_ = Memory(ctx_, bytes, "scratch");
  capacity_ = bytes;
}

void* Scratch::take(int64_t bytes) {
  const int64_t end = used_ + round_up(bytes, kAlign);
  if (end > capacity_)
    throw std::logic_error("scratch too small: an operation needs " + std::to_string(end) + " bytes, " +
                           std::to_string(capacity_) + " are reserved");
  void* block = memory_.data() + used_;
  used_ = end;
  high_water_ = std::max(high_water_, used_);
  return block;
}

int use_threads(int wanted) {
  omp_set_dynamic(0);  // a busy machine makes teams slower, not smaller
  omp_set_num_threads(wanted);
  if (wanted == 1) return 1;  // a team of one would end the others' threads
  int team = 1;
#pragma omp parallel
#pragma omp master
  team = omp_get_num_threads();
  omp_set_num_threads(team);
  return team;
}

void use_cpu(Context& ctx, int threads) {
  ctx.where = Where::cpu;
  ctx.dtype = DType::f32;
  ctx.device.reset();
  ctx.threads = use_threads(threads > 0 ? threads : omp_get_num_procs());
}

void use_gpu([[maybe_unused]] Context& ctx, [[maybe_unused]] int index, [[maybe_unused]] DType dtype) {
  if constexpr (kHaveGpu) {
    ctx.device = gpu::open(index);
    ctx.where = Where::gpu;
    ctx.dtype = dtype;
    ctx.threads = use_threads(omp_get_num_procs());
  } else {
    throw std::runtime_error("this program was built without CUDA, GPU, build with `make CUDA=1`");
  }
}

OnHost::OnHost(Context* ctx, const Tensor& tensor, [[maybe_unused]] bool load)
    : ctx_(ctx), there_(tensor), here_(tensor) {
  if constexpr (kHaveGpu)
    if (ctx != nullptr && ctx->where == Where::gpu && tensor.size() > 0) {
      copy_.resize(static_cast<size_t>(tensor.bytes()));
      here_.data = copy_.data();
      if (load) gpu::copy_out(*ctx->device, here_.data, there_.data, tensor.bytes());
    }
}

void OnHost::store() {
  if constexpr (kHaveGpu)
    if (!copy_.empty()) gpu::copy_in(*ctx_->device, there_.data, here_.data, there_.bytes());
}

void Arena::add(Tensor* tensor, DType dtype, Shape shape) {
  if (memory_.data() != nullptr) throw std::logic_error("Arena::add after allocate: " + name_);
  *tensor = Tensor(nullptr, dtype, shape);
  entries_.push_back({tensor, bytes_});
  bytes_ += round_up(tensor->bytes(), kAlign);
}

void Arena::move_to(int64_t place) {
  const int64_t here = bytes_ / kAlign, gap = (place - here) % kPlaces;
  bytes_ += (gap < 0 ? gap + kPlaces : gap) * kAlign;
}

void Arena::allocate(Context& ctx) {
  if (memory_.data() != nullptr || entries_.empty()) return;
  memory_ = Memory(ctx, bytes_, name_.c_str());
  for (const Entry& entry : entries_) entry.tensor->data = memory_.data() + entry.offset;
}

void OpTimer::begin() {
  if constexpr (kHaveGpu)
    if (ctx_.device) gpu::synchronize(*ctx_.device);
  outer_inner_ = ctx_.profile->inner;
  ctx_.profile->inner = 0;
  start_ = Profile::Clock::now();
}

void OpTimer::end() {
  if constexpr (kHaveGpu)
    if (ctx_.device) gpu::synchronize(*ctx_.device);
  const double seconds = std::chrono::duration<double>(Profile::Clock::now() - start_).count();
  ctx_.profile->add(op_, seconds - ctx_.profile->inner, work_);
  ctx_.profile->inner = outer_inner_ + seconds;
}
