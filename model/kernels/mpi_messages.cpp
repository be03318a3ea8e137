#include "model/kernels/mpi_messages.h"

#include <fmt/format.h>

#include "error.h"
#include "model/kernels/mpi_process.h"

namespace {
constexpr int kTag = 0;
}

MPI_Request& MpiMessages::add(int rank, int64_t expected) {
  others_.push_back({rank, expected});
  return requests_.emplace_back(MPI_REQUEST_NULL);
}

void MpiMessages::receive(char* to, int64_t bytes, int from) {
  mpi_check(MPI_Irecv(to, static_cast<int>(bytes), MPI_BYTE, from, kTag, MPI_COMM_WORLD, &add(from, bytes)),
            "receive from", from);
}

void MpiMessages::send(const char* from, int64_t bytes, int to) {
  mpi_check(MPI_Isend(from, static_cast<int>(bytes), MPI_BYTE, to, kTag, MPI_COMM_WORLD, &add(to, -1)),
            "send to", to);
}

void MpiMessages::wait(const std::function<void()>& idle) {
  std::vector<MPI_Status> statuses(requests_.size());
  for (int looks = 0, done = 0; done == 0; ++looks) {
    const int code =
        MPI_Testall(static_cast<int>(requests_.size()), requests_.data(), &done, statuses.data());
    if (code == MPI_ERR_IN_STATUS) check_one_by_one(statuses);
    mpi_check(code, "wait for messages");
    if (done != 0) break;
    idle();
    mpi_rest(looks);
  }
  for (size_t i = 0; i < statuses.size(); ++i) {
    if (others_[i].expected < 0) continue;
    int bytes = 0;
    mpi_check(MPI_Get_count(&statuses[i], MPI_BYTE, &bytes), "count what came from", others_[i].rank);
    if (bytes != others_[i].expected)
      throw RunError(
          fmt::format("it sent {} bytes where {} were expected, rank {}, start all ranks with the "
                      "same program, options and files",
                      bytes, others_[i].expected, others_[i].rank));
  }
  requests_.clear();
  others_.clear();
}

/// Finds the message that failed.
void MpiMessages::check_one_by_one(const std::vector<MPI_Status>& statuses) const {
  for (size_t i = 0; i < statuses.size(); ++i)
    if (statuses[i].MPI_ERROR != MPI_ERR_PENDING)
      mpi_check(statuses[i].MPI_ERROR, "exchange messages with", others_[i].rank);
}
