// How many threads a context takes where OpenMP gives fewer than there are cores, and how they share work.
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "model/kernels/simd.h"
#include "optim/svd.h"
#include "tests/optim_golden.h"

namespace {
/// Every team has one thread, as with OMP_THREAD_LIMIT=1, which is read once, when a process starts.
class OneAtATime {
 public:
  OneAtATime() { omp_set_max_active_levels(0); }
  ~OneAtATime() { omp_set_max_active_levels(before_); }
  OneAtATime(const OneAtATime&) = delete;
  OneAtATime& operator=(const OneAtATime&) = delete;

 private:
  const int before_ = omp_get_max_active_levels();
};
}  // namespace

TEST(Threads, NoMoreThanThereWillBe) {
  const OneAtATime limit;
  CpuContext ctx(2);
  ASSERT_EQ(ctx.threads, 1);
  EXPECT_EQ(omp_get_max_threads(), 1);
  // OpenBLAS would wait here for a second thread.
  Matrix found = random_matrix(150, 200, 3), expected = found;
  svd_polar(ctx, found.tensor());
  CpuContext one(1);
  svd_polar(one, expected.tensor());
  EXPECT_EQ(found.data, expected.data);
}

TEST(Threads, NoMoreThanThereWillBeBesideAGpu) {
  if (!kHaveGpu) GTEST_SKIP() << "a program without CUDA";
  const OneAtATime limit;
  omp_set_num_threads(2);
  Context ctx;
  use_gpu(ctx, 0, DType::f32);
  EXPECT_EQ(ctx.threads, 1);
  EXPECT_EQ(omp_get_max_threads(), 1);
}

TEST(Threads, AsManyOnABusyMachine) {  // with OMP_DYNAMIC=true OpenMP gives what the load leaves
  omp_set_dynamic(1);
  const CpuContext ctx(2);
  EXPECT_EQ(omp_get_dynamic(), 0);
  omp_set_dynamic(0);
}

TEST(Threads, DealOutEveryElementOnceAtWholeGrains) {
  const std::vector<Share> shares = {{1, 7}, {0, 5}, {100'003, 16}, {4096, 1024}, {50, 1000}};
  for (const int threads : {1, 2, 5}) {
    const CpuContext ctx(threads);
    std::vector<std::vector<int>> times;
    for (const Share& share : shares) times.emplace_back(share.n, 0);
    std::atomic<int> askew = 0, ranges = 0;
    deal_out(ctx, shares, [&](int64_t i, int64_t begin, int64_t end) {
      ++ranges;
      if (begin % shares[i].grain != 0 || end <= begin || end > shares[i].n) ++askew;
      for (int64_t k = begin; k < end; ++k) ++times[i][k];
    });
    EXPECT_EQ(askew, 0);
    EXPECT_TRUE(threads == 1 ? ranges == 4 : ranges > 8) << ranges;  // nothing to cut; none without elements
    for (const std::vector<int>& share : times) EXPECT_EQ(std::ranges::count(share, 1), std::ssize(share));
  }
}

TEST(Threads, AGrainIsNotShared) {
  const CpuContext ctx(2);
  std::atomic<int> team = 0;
  deal_out(ctx, 1000, 1000, [&](int64_t, int64_t) { team = omp_get_num_threads(); });
  EXPECT_EQ(team, 1);
  deal_out(ctx, 0, 1000, [&](int64_t, int64_t) { team = 0; });
  EXPECT_EQ(team, 1);
}
