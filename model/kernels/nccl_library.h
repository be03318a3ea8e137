// The functions of NCCL that we call. The program does not link the library: it is opened when several ranks
// meet on GPUs. The executor has its own.
#pragma once

#ifdef CUDA_ON_CPU
#include "dev/cuda_on_cpu/nccl.h"
#else
#include <nccl.h>
#endif

#include <string>

#include "model/kernels/shared_library.h"

struct NcclLibrary {
#ifdef CUDA_ON_CPU
#define NCCL_FUNCTION(name) decltype(&::name) const name = &::name
#else
#define NCCL_FUNCTION(name) SHARED_FUNCTION(name)
  const SharedLibrary file{"libnccl.so." + std::to_string(NCCL_MAJOR), "ranks on GPUs need NCCL",
                           "install it or name its folder in LD_LIBRARY_PATH, or build with NCCL=0 and use "
                           "mpirun"};
#endif

  NCCL_FUNCTION(ncclAllGather);
  NCCL_FUNCTION(ncclAllReduce);
  NCCL_FUNCTION(ncclBroadcast);
  NCCL_FUNCTION(ncclReduce);
  NCCL_FUNCTION(ncclReduceScatter);
  NCCL_FUNCTION(ncclCommAbort);
  NCCL_FUNCTION(ncclCommDestroy);
  NCCL_FUNCTION(ncclCommGetAsyncError);
  NCCL_FUNCTION(ncclCommInitRank);
  NCCL_FUNCTION(ncclGetErrorString);
  NCCL_FUNCTION(ncclGetLastError);
  NCCL_FUNCTION(ncclGetUniqueId);
  NCCL_FUNCTION(ncclGroupEnd);
  NCCL_FUNCTION(ncclGroupStart);
#undef NCCL_FUNCTION
};

inline const NcclLibrary& nccl() {
  return opened<NcclLibrary>();
}
