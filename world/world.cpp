#include "world/world.h"

#include <fmt/format.h>
#include <omp.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <optional>
#include <string_view>

#include "error.h"
#include "model/kernels/backends.h"
#include "model/kernels/comm_mpi.h"
#include "model/kernels/comm_nccl.h"
#include "world/rendezvous.h"

namespace {
/// The variables of one launcher.
struct Launcher {
  ProcessLaunch::By by;
  const char *rank, *size, *local_rank;
};
constexpr Launcher kLaunchers[] = {
    {ProcessLaunch::By::openmpi, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
     "OMPI_COMM_WORLD_LOCAL_RANK"},
    {ProcessLaunch::By::pmi, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"},
    {ProcessLaunch::By::ranks, "RANK", "WORLD_SIZE", "LOCAL_RANK"},
    {ProcessLaunch::By::slurm, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"}};

/// A whole number from the environment; none when the variable is not set.
std::optional<int> number(const Environment& environment, const char* name, int least, int most) {
  const char* text = environment(name);
  if (text == nullptr) return std::nullopt;
  const std::string_view digits(text);
  int value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (error != std::errc() || end != digits.data() + digits.size() || value < least || value > most)
    throw UsageError(fmt::format(
        "'{}' is not a whole number from {} to {}, {} in the environment, set it right or unset it", digits,
        least, most, name));
  return value;
}

/// What one launcher says; none when it started nothing.
std::optional<ProcessLaunch> launched_by(const Launcher& launcher, const Environment& environment) {
  constexpr int kMostRanks = 1 << 16;
  const auto size = number(environment, launcher.size, 1, kMostRanks);
  const auto rank = number(environment, launcher.rank, 0, size.value_or(kMostRanks) - 1);
  if (!size && !rank) return std::nullopt;
  if (!size || !rank)
    throw UsageError(fmt::format("it is not set but {} is, {} in the environment, set both or none",
                                 size ? launcher.size : launcher.rank, size ? launcher.rank : launcher.size));
  ProcessLaunch launch;
  launch.by = launcher.by;
  launch.rank = *rank;
  launch.size = *size;
  launch.local_rank = number(environment, launcher.local_rank, 0, *size - 1).value_or(-1);
  return launch;
}

/// True in a process that srun started: a batch script, a shell of salloc and what mpirun starts there see
/// Slurm's numbers too, and those count other things.
bool in_step_of_srun(const Environment& environment) {
  const char* step = environment("SLURM_STEP_ID");
  if (step == nullptr) return false;
  constexpr int64_t kFirstSpecial = 0xfffffff0;  // steps that are no srun's: batch, interactive, ...
  return std::strtoll(step, nullptr, 10) < kFirstSpecial;
}

/// A machine: two containers on one are two when they have names of their own.
std::string machine_name() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  std::string boot;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> boot;
  return fmt::format("{} {}", name, boot);
}

/// The cores that this process may use, "11" for the first two.
std::string allowed_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::string cores;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return cores;  // more than 1024 cores
  for (int core = 0; core < CPU_SETSIZE; ++core) cores += CPU_ISSET(core, &set) ? '1' : '0';
  cores.resize(cores.find_last_of('1') + 1);
  return cores;
}
}  // namespace

const char* ProcessLaunch::size_variable() const {
  for (const Launcher& launcher : kLaunchers)
    if (launcher.by == by) return launcher.size;
  return "one process";
}

ProcessLaunch find_launch(const Environment& environment) {
  ProcessLaunch launch;
  for (const Launcher& launcher : kLaunchers) {
    if (launcher.by == ProcessLaunch::By::slurm && !in_step_of_srun(environment)) continue;
    const auto found = launched_by(launcher, environment);
    if (!found) continue;
    // torchrun under srun numbers other processes than srun does; no such thing is meant below mpirun.
    const bool set_aside = launcher.by == ProcessLaunch::By::slurm;
    if (launch.by == ProcessLaunch::By::hand)
      launch = *found;
    else if (!set_aside && (found->rank != launch.rank || found->size != launch.size))
      throw UsageError(fmt::format(
          "rank {} of {} contradicts rank {} of {} ({}), {} in the environment, use one launcher",
          found->rank, found->size, launch.rank, launch.size, launch.size_variable(), launcher.size));
  }
  if (launch.size == 1) return launch;
  if (const char* address = environment("MASTER_ADDR")) launch.address = address;
  if (launch.by == ProcessLaunch::By::ranks && launch.address.empty())
    throw UsageError(
        "it is not set but WORLD_SIZE is, MASTER_ADDR in the environment, set it to the address of rank 0");
  launch.port = number(environment, "MASTER_PORT", 1, 65535).value_or(launch.port);
  // There torchrun itself listens at the port; the next one is as good for us.
  const char* agent = environment("TORCHELASTIC_USE_AGENT_STORE");
  if (agent != nullptr && std::string_view(agent) == "True") launch.port = launch.port % 65535 + 1;
  return launch;
}

namespace {
/// How the ranks meet. With an address and without a launcher that MPI knows: over TCP, for NCCL.
bool meet_over_mpi(const ProcessLaunch& launch) {
  switch (launch.by) {
    case ProcessLaunch::By::hand:
    case ProcessLaunch::By::ranks:
      return false;
    case ProcessLaunch::By::openmpi:
    case ProcessLaunch::By::pmi:
      return kHaveMpi || launch.address.empty();
    case ProcessLaunch::By::slurm:
      return !kHaveNccl || launch.address.empty();
  }
  return false;
}

/// What helps where there is no way over NCCL.
constexpr const char* kTakeMpi =
    kHaveMpi ? "start them with mpirun -np N"
             : "install libopenmpi-dev and openmpi-bin and build again, or start one process";

UsageError no_way(const ProcessLaunch& launch, const std::string& what, const char* advice) {
  return UsageError(fmt::format("{}, {}={}, {}", what, launch.size_variable(), launch.size, advice));
}
}  // namespace

World::World(ProcessLaunch launch) : launch_(std::move(launch)) {
  if (launch_.size == 1) {
    launch_.local_rank = 0;
    threads_ = omp_get_num_procs();
    return;
  }
  if (meet_over_mpi(launch_)) {
    if constexpr (kHaveMpi) {
      mpi_ = std::make_shared<MpiProcess>();
      if (mpi_->size() != launch_.size || mpi_->rank() != launch_.rank)
        throw no_way(launch_,
                     fmt::format("MPI sees rank {} of {} where the launcher says rank {}", mpi_->rank(),
                                 mpi_->size(), launch_.rank),
                     "start with mpirun of the MPI that the program was built with, or srun --mpi=pmix");
    } else {
      throw no_way(launch_, "this program was built without MPI and several processes of it were started",
                   kTakeMpi);
    }
  } else {
    bool gpus = false;
    if constexpr (kHaveNccl) gpus = gpu::count() > 0;
    if (!gpus)
      throw no_way(launch_,
                   kHaveNccl  ? "there is no GPU here, and CPU processes talk over MPI"
                   : kHaveMpi ? "this program was built without NCCL, and talks over MPI alone"
                              : "this program was built with neither MPI nor NCCL and several processes of "
                                "it were started",
                   kTakeMpi);
    rendezvous_ = std::make_unique<Rendezvous>(launch_.rank, launch_.size, launch_.address, launch_.port);
  }
  find_neighbours();
}

World::~World() = default;

std::vector<std::string> World::gather(const std::string& mine) {
  if (rendezvous_) return rendezvous_->gather(mine);
  if constexpr (kHaveMpi)
    if (mpi_) return mpi_->gather(mine);
  return {mine};
}

/// Who else is on this machine, and which cores they may use.
void World::find_neighbours() {
  const std::string machine = machine_name() + '\n', cores = allowed_cores();
  std::vector<double> users(cores.size(), 0);  // of each core
  int before = 0;
  local_size_ = 0;
  const std::vector<std::string> all = gather(machine + cores);
  for (size_t r = 0; r < all.size(); ++r) {
    if (!all[r].starts_with(machine)) continue;
    before += static_cast<int>(r) < rank() ? 1 : 0;
    ++local_size_;
    const std::string_view theirs = std::string_view(all[r]).substr(machine.size());
    for (size_t core = 0; core < std::min(users.size(), theirs.size()); ++core)
      users[core] += theirs[core] == '1' ? 1 : 0;
  }
  if (launch_.local_rank < 0) launch_.local_rank = before;
  double share = cores.empty() ? static_cast<double>(omp_get_num_procs()) / local_size_ : 0;
  for (size_t core = 0; core < cores.size(); ++core)
    if (cores[core] == '1') share += 1 / users[core];
  threads_ = std::max(1, static_cast<int>(std::floor(share + 1e-6)));
}

void World::join(Context& ctx, std::function<void()> poll) {
  if (size() == 1) return;
  const bool on_gpu = ctx.where == Where::gpu;
  std::string device = on_gpu ? "GPU" : "CPU";
  if constexpr (kHaveNccl)
    if (on_gpu) device += ' ' + machine_name() + ' ' + nccl_device(ctx);
  std::vector<std::string> devices = gather(device);
  for (size_t r = 0; r < devices.size(); ++r)
    if (devices[r].substr(0, 3) != device.substr(0, 3))
      throw RunError(
          fmt::format("rank {} is on a {} and rank {} on a {}, --device, give all ranks the same kind", r,
                      devices[r].substr(0, 3), rank(), device.substr(0, 3)));
  std::sort(devices.begin(), devices.end());
  const bool apart = std::adjacent_find(devices.begin(), devices.end()) == devices.end();
  if (kHaveNccl && on_gpu && apart) return join_over_nccl(ctx, std::move(poll));
  if constexpr (kHaveMpi)
    if (mpi_) {
      ctx.comm = make_mpi_comm(ctx, mpi_, {.poll = std::move(poll)});
      return;
    }
  throw no_way(launch_, on_gpu ? "ranks share a GPU, which NCCL refuses" : "CPU processes talk over MPI",
               on_gpu ? "start one rank per GPU, or more of them with mpirun" : kTakeMpi);
}

void World::join_over_nccl([[maybe_unused]] Context& ctx, [[maybe_unused]] std::function<void()> poll) {
  if constexpr (kHaveNccl) {
    const std::string id = gather(rank() == 0 ? nccl_unique_id() : "").front();
    auto nccl = make_nccl_comm(ctx, id, rank(), size(), std::move(poll));
    // MPI, where it started this job, has to end it, after the communicator.
    Comm* const comm = nccl.get();
    ctx.comm = {comm, [nccl = std::move(nccl), mpi = mpi_](Comm*) mutable {
                  nccl.reset();
                  mpi.reset();
                }};
  }
}
