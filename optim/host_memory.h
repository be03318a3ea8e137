// What the functions that call LAPACK share: float64 working memory on the host, the way into it and back,
// and several matrices at once.
#pragma once

#include <omp.h>

#include <algorithm>
#include <exception>
#include <limits>
#include <utility>
#include <vector>

#include "model/kernels/context.h"
#include "model/kernels/simd.h"

/// A stretch of working memory that is given out piece by piece.
class HostRoom {
 public:
  HostRoom(double* begin, int64_t count) : next_(begin), end_(begin + count) {}
  double* doubles(int64_t count) {
    expect(count <= end_ - next_, "HostRoom: too small");
    return std::exchange(next_, next_ + count);
  }
  /// LAPACK's integers, in the room of as many doubles.
  int* ints(int64_t count) { return reinterpret_cast<int*>(doubles(count)); }

 private:
  double *next_, *end_;
};

/// Rounded up to whole lines of 64 bytes: some BLAS go another way through vectors that begin elsewhere in a
/// line, with other bits.
constexpr int64_t whole_lines(int64_t doubles) {
  return (doubles + 7) / 8 * 8;
}

/// Working memory on the host, from the beginning of a line on: scratch on the CPU; on a GPU, whose scratch
/// is out of reach, a block of its own. Given back with the object.
class HostMemory {
 public:
  HostMemory(Context& ctx, int64_t doubles)
      : frame_(ctx.scratch),
        block_(ctx.where == Where::gpu ? static_cast<size_t>(whole_lines(doubles) / 8) : 0) {
    begin_ = ctx.where == Where::cpu ? frame_.doubles(doubles) : reinterpret_cast<double*>(block_.data());
  }
  HostRoom room(int64_t start, int64_t count) const { return {begin_ + start, count}; }

 private:
  struct alignas(64) Line {
    double values[8];
  };
  Scratch::Frame frame_;
  std::vector<Line> block_;
  double* begin_;
};

/// How many of `count` matrices that take `doubles` each are in LAPACK's hands at once: one for each thread,
/// while their memory stays below a gigabyte.
inline int64_t rooms_of(const Context& ctx, int64_t count, int64_t doubles) {
  const int64_t most = std::clamp<int64_t>(count, 1, ctx.threads);
  return std::clamp<int64_t>((int64_t{1} << 27) / std::max<int64_t>(1, doubles), 1, most);
}
/// Scratch of side_by_side(); none on a GPU.
inline int64_t side_by_side_bytes(const Context& ctx, int64_t count, int64_t doubles) {
  return ctx.where == Where::gpu ? 0 : rooms_of(ctx, count, doubles) * whole_lines(doubles) * 8;
}

/// While it lives, LAPACK called from this thread stays on it (an OpenMP BLAS asks for this number).
class OneThread {
 public:
  OneThread() { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  const int before_ = omp_get_max_threads();
};

/// body(i, room) for each of `count` matrices of one size, with room for `doubles`: several at once, each by
/// one thread, a single one, too, so that a matrix has the same bits whatever it comes with. Half of an
/// eigendecomposition goes through vectors, which threads hardly speed up: at n = 384 two matrices side by
/// side take 12.5 ms, one after the other by two threads each 34.
template <typename Body>
void side_by_side(Context& ctx, int64_t count, int64_t doubles, const Body& body) {
  const int64_t rooms = rooms_of(ctx, count, doubles);
  const int64_t each = whole_lines(doubles);
  const HostMemory memory(ctx, rooms * each);
  std::exception_ptr failed;
  parallel_for(ctx, count, (count + rooms - 1) / rooms, [&](int64_t begin, int64_t end, int thread) {
    try {
      const OneThread alone;
      for (int64_t i = begin; i < end; ++i) {
        HostRoom room = memory.room(thread * each, doubles);
        body(i, room);
      }
    } catch (...) {  // may not leave a thread
#pragma omp critical(side_by_side)
      failed = std::current_exception();
    }
  });
  if (failed) std::rethrow_exception(failed);
}

/// to[i] <- element i of `from`, f32 or f64 in host memory. False when one of them is not finite: LAPACK may
/// loop for ever on those.
inline bool load_doubles(double* to, const Tensor& from) {
  const int64_t n = from.size();
  if (from.dtype == DType::f64)
    std::copy_n(from.f64(), n, to);
  else
    std::copy_n(from.f32(), n, to);
  double finite = 0;  // 0 * x is 0, or NaN for anything that is not finite
#pragma omp simd reduction(+ : finite)
  for (int64_t i = 0; i < n; ++i) finite += 0.0 * to[i];
  return finite == 0;
}

/// Element i of `to`, f32 or f64 in host memory, <- value(i).
template <typename Value>
void store_doubles(const Tensor& to, Value&& value) {
  if (to.dtype == DType::f64) {
    for (int64_t i = 0; i < to.size(); ++i) to.f64()[i] = value(i);
  } else {
    for (int64_t i = 0; i < to.size(); ++i) to.f32()[i] = static_cast<float>(value(i));
  }
}

inline void store_nan(const Tensor& to) {
  store_doubles(to, [](int64_t) { return std::numeric_limits<double>::quiet_NaN(); });
}
