#include "model/kernels/mpi_process.h"

#include <fmt/format.h>
#include <mpi.h>
#include <sched.h>

#include <chrono>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <thread>

#include "error.h"

void mpi_check(int code, const char* what, int rank) {
  if (code == MPI_SUCCESS) return;
  char words[MPI_MAX_ERROR_STRING] = "";
  int length = 0;
  MPI_Error_string(code, words, &length);
  throw RunError(fmt::format(
      "MPI could not {}{}: {}, MPI, look for what the other ranks say and at the network", what,
      rank < 0 ? "" : fmt::format(" rank {}", rank), std::string_view(words, static_cast<size_t>(length))));
}

void mpi_rest(int looks) {
  constexpr int kEagerLooks = 50;
  if (looks < kEagerLooks)
    sched_yield();
  else
    std::this_thread::sleep_for(std::chrono::microseconds(20));
}

MpiProcess::MpiProcess() : exceptions_(std::uncaught_exceptions()) {
  int level = 0;
  mpi_check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &level), "start");
  if (level < MPI_THREAD_SERIALIZED)
    throw RunError("this MPI serves one thread only, MPI, use one with MPI_THREAD_SERIALIZED");
  mpi_check(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN), "start");
  mpi_check(MPI_Comm_rank(MPI_COMM_WORLD, &rank_), "start");
  mpi_check(MPI_Comm_size(MPI_COMM_WORLD, &size_), "start");
}

MpiProcess::~MpiProcess() {
  if (!abandoned_ && std::uncaught_exceptions() <= exceptions_) MPI_Finalize();
}

std::vector<std::string> MpiProcess::gather(const std::string& mine) {
  constexpr size_t kBytes = 1024;  // of each rank: a length, then the text
  if (mine.size() > 1000) throw std::logic_error("MpiProcess::gather: more than 1000 bytes");
  std::vector<char> all(kBytes * static_cast<size_t>(size_)), block(kBytes);
  const uint64_t length = mine.size();
  std::memcpy(block.data(), &length, sizeof length);
  std::memcpy(block.data() + sizeof length, mine.data(), mine.size());
  MPI_Request request = MPI_REQUEST_NULL;
  mpi_check(
      MPI_Iallgather(block.data(), kBytes, MPI_BYTE, all.data(), kBytes, MPI_BYTE, MPI_COMM_WORLD, &request),
      "gather");
  for (int looks = 0, done = 0; !done; ++looks) {
    mpi_check(MPI_Test(&request, &done, MPI_STATUS_IGNORE), "gather");
    if (!done) mpi_rest(looks);
  }
  std::vector<std::string> texts;
  for (const char* text = all.data(); text != all.data() + all.size(); text += kBytes) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, text, sizeof bytes);
    texts.emplace_back(text + sizeof bytes, bytes);
  }
  return texts;
}
