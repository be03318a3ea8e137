// Which ways to talk to other processes are part of this binary: what the Makefile found on this machine, or
// was told with MPI=0 and NCCL=0. Only .cpp files include this; the Makefile gives them the values.
#pragma once

#if !defined(HAVE_MPI) || !defined(HAVE_NCCL)
#error "HAVE_MPI, HAVE_NCCL: the Makefile defines them for .cpp files that include this, not for headers"
#endif

/// comm_mpi.cpp is there. Like kHaveGpu: calls into it stand behind `if constexpr (kHaveMpi)`.
inline constexpr bool kHaveMpi = HAVE_MPI;
/// comm_nccl.cu is there.
inline constexpr bool kHaveNccl = HAVE_NCCL;
