// The job: how many processes there are, who this one is, and how they come together. What launchers say in
// the environment is read here and nowhere else.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "model/kernels/context.h"

/// How this process was started.
struct ProcessLaunch {
  enum class By : uint8_t {
    hand,     // a single process
    openmpi,  // OMPI_COMM_WORLD_RANK, ..., by mpirun of OpenMPI
    pmi,      // PMI_RANK, PMI_SIZE, by mpiexec of MPICH and Intel, and by srun --mpi=pmi2
    slurm,    // SLURM_PROCID, SLURM_NTASKS, by srun
    ranks     // RANK, WORLD_SIZE, as torchrun sets them
  };
  By by = By::hand;
  int rank = 0, size = 1;
  int local_rank = -1;  // among the ranks of this machine; -1: it was not said
  std::string address;  // MASTER_ADDR: of rank 0, where the ranks meet over TCP; empty: they meet over MPI
  int port = 29500;     // MASTER_PORT: likewise

  /// "OMPI_COMM_WORLD_SIZE": the variable that says how many there are.
  const char* size_variable() const;
};

/// Looks a variable of the environment up; null when it is not set.
using Environment = std::function<const char*(const char*)>;
/// Reads the environment. UsageError that names the variable for numbers that make no sense, for half of a
/// pair, and when two launchers contradict each other.
ProcessLaunch find_launch(const Environment& environment = [](const char* name) {
  return std::getenv(name);
});

class MpiProcess;
class Rendezvous;

/// The ranks of the job before they compute.
class World {
 public:
  /// Waits until all ranks are here. UsageError when this binary cannot do what the launcher asks: without
  /// MPI under mpirun, for one.
  explicit World(ProcessLaunch launch);
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  int rank() const { return launch_.rank; }
  int size() const { return launch_.size; }
  const ProcessLaunch& launch() const { return launch_; }
  /// Among the ranks of this machine.
  int local_rank() const { return launch_.local_rank; }
  int local_size() const { return local_size_; }
  /// This rank's share of the cores that it may use: each core is divided among the ranks that may use it.
  int threads() const { return threads_; }

  /// What every rank says, by rank; at most 1000 bytes each. Waits for all. Before join().
  std::vector<std::string> gather(const std::string& mine);
  /// Makes ctx.comm, once ctx computes where it will: NCCL between GPUs of their own, else MPI. UsageError
  /// when this binary has no way between these devices. `poll` is called a few times a second while a rank
  /// waits for others, in any thread; what it throws ends the wait.
  void join(Context& ctx, std::function<void()> poll = {});

 private:
  void find_neighbours();
  void join_over_nccl(Context& ctx, std::function<void()> poll);
  ProcessLaunch launch_;
  int local_size_ = 1, threads_ = 1;
  std::shared_ptr<MpiProcess> mpi_;
  std::unique_ptr<Rendezvous> rendezvous_;
};
