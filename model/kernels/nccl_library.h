// The functions of NCCL that we call. The program does not link the library: it is opened when several ranks
// meet on GPUs.
#pragma once

#include <nccl.h>

#include <string>

#include "model/kernels/shared_library.h"

struct NcclLibrary {
  const SharedLibrary file{"libnccl.so." + std::to_string(NCCL_MAJOR), "ranks on GPUs need NCCL",
                           "install it or name its folder in LD_LIBRARY_PATH, or build with NCCL=0 and use "
                           "mpirun"};

  SHARED_FUNCTION(ncclAllGather);
  SHARED_FUNCTION(ncclAllReduce);
  SHARED_FUNCTION(ncclBroadcast);
  SHARED_FUNCTION(ncclReduce);
  SHARED_FUNCTION(ncclReduceScatter);
  SHARED_FUNCTION(ncclCommAbort);
  SHARED_FUNCTION(ncclCommDestroy);
  SHARED_FUNCTION(ncclCommGetAsyncError);
  SHARED_FUNCTION(ncclCommInitRank);
  SHARED_FUNCTION(ncclGetErrorString);
  SHARED_FUNCTION(ncclGetLastError);
  SHARED_FUNCTION(ncclGetUniqueId);
  SHARED_FUNCTION(ncclGroupEnd);
  SHARED_FUNCTION(ncclGroupStart);
};

inline const NcclLibrary& nccl() {
  return opened<NcclLibrary>();
}
