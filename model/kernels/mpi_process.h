// MPI in this process: its beginning and its end, and what it says when it fails. Files named mpi_* are the
// only ones that know mpi.h; they are built where the Makefile found MPI (kHaveMpi in backends.h).
#pragma once

#include <string>
#include <vector>

/// From MPI_Init to MPI_Finalize: one per process, made and ended in the same thread.
class MpiProcess {
 public:
  /// RunError when MPI cannot start.
  MpiProcess();
  /// Waits for the other ranks (MPI_Finalize) at a clean end. Not after abandon() and not while an exception
  /// passes: the others may be gone. mpirun then ends them, because this one leaves without a farewell.
  ~MpiProcess();
  MpiProcess(const MpiProcess&) = delete;
  MpiProcess& operator=(const MpiProcess&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  /// What every rank says, by rank; at most 1000 bytes each. Waits for all. Not while a communicator lives:
  /// MPI belongs to its thread.
  std::vector<std::string> gather(const std::string& mine);
  /// There will be no clean end.
  void abandon() { abandoned_ = true; }

 private:
  int rank_ = 0, size_ = 1;
  int exceptions_;  // under way when this was made
  bool abandoned_ = false;
};

/// RunError "MPI could not <what> rank <rank>: ..." unless the call succeeded. Without a rank, `what` alone.
void mpi_check(int code, const char* what, int rank = -1);
/// Between two looks at whether messages have come, the first of them number 0: a small message takes
/// microseconds, for a large one the core is given away.
void mpi_rest(int looks);
