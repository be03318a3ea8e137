// The links between two ranks, for a machine file: `mpirun -np 2 links` prints JSON. measure.py builds and
// runs it. bandwidth: bytes per second that each rank sends while it receives as many, in messages of 1 MiB,
// as the communicator does; latency: an exchange of 8 bytes. Both are the best of some rounds.
#if __has_include(<mpi.h>)  // the linter has no MPI everywhere
#include <mpi.h>

#include <algorithm>
#include <cstdio>
#include <vector>

namespace {
/// Seconds of one exchange of `bytes` with the other rank, one after the other, both ways at once.
double seconds(int other, int bytes, int exchanges) {
  std::vector<char> out(static_cast<size_t>(bytes)), in(out.size());
  double best = 1e30;
  for (int round = 0; round < 20; ++round) {
    MPI_Barrier(MPI_COMM_WORLD);
    const double start = MPI_Wtime();
    for (int i = 0; i < exchanges; ++i)
      MPI_Sendrecv(out.data(), bytes, MPI_BYTE, other, 0, in.data(), bytes, MPI_BYTE, other, 0,
                   MPI_COMM_WORLD, MPI_STATUS_IGNORE);
    best = std::min(best, (MPI_Wtime() - start) / exchanges);
  }
  return best;
}
}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int rank = 0, size = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  if (size != 2) {
    if (rank == 0) std::fprintf(stderr, "links: error: %d ranks, mpirun -np, start two\n", size);
    MPI_Finalize();
    return 2;
  }
  constexpr int kLarge = 1 << 20, kSmall = 8;
  const double large = seconds(1 - rank, kLarge, 64), small = seconds(1 - rank, kSmall, 1000);
  if (rank == 0) std::printf("{\"bandwidth\": %.6g, \"latency\": %.6g}\n", kLarge / large, small);
  MPI_Finalize();
}
#endif
