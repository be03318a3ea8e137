#!/bin/sh
# tests/rooms.sh: the rules of the rooms that a compiler does not check (DESIGN: arrows point one way).
set -u
bad=0
# forbid WHAT PATTERN FILES...: no line of the files may match
forbid() {
  what=$1 pattern=$2
  shift 2
  # shellcheck disable=SC2068  # file names without spaces
  if grep -nE "$pattern" $@ /dev/null; then
    echo "tests/rooms.sh: error: $what" >&2
    bad=1
  fi
}
forbid 'kernels include nothing above them' \
  '#include "(model/[a-z_]+\.|optim/|data/|world/|options|setup|commands|run_log)' $(ls model/kernels/*)
forbid 'the model knows nothing of optimizers, data or the command line' \
  '#include "(optim/|data/|world/|options|setup|commands|run_log)' $(ls model/*.h model/*.cpp)
forbid 'optimizers know nothing of data or the command line' \
  '#include "(data/|world/|options|setup|commands|run_log)' $(ls optim/*)
forbid 'data knows nothing of models and optimizers' '#include "(model/[a-z_]+\.|optim/|world/|options|setup|commands|run_log)' $(ls data/*.h data/*.cpp)
forbid 'the world knows processes, not what they train' '#include "(model/[a-z_]+\.|optim/|data/|options|setup|commands|run_log)' $(ls world/*)
forbid 'only doors may pick the device' 'ON_DEVICE' $(ls model/*.h model/*.cpp optim/*.cpp data/*.cpp ./*.cpp)
forbid 'kernel files use the portability headers: no PTX, no <<<>>>, no CUDA headers or libraries of their own' \
  'asm( volatile)?[ (]|<<<|cooperative_groups|#include <(cuda|cub|cooperative|nccl)' \
  $(ls model/kernels/*.cu model/kernels/*.cuh optim/*.cu dev/lab/*.cu 2>/dev/null | grep -v '/context.cu\|/stream.cu')
forbid 'a kernel says how many threads its blocks have at most, so that its registers fit: __global__ void __launch_bounds__(N)' \
  '__global__ void [^_]|__global__ [^v]|__global__$' $(ls model/kernels/*.cu model/kernels/*.cuh optim/*.cu optim/*.cuh dev/lab/*.cu dev/harness/*.cu)
forbid 'libraries of CUDA are opened when they are needed: their headers are for the files named *_library.h' '#include <(cublas|nccl)' \
  $(git ls-files '*.h' '*.cuh' '*.cpp' '*.cu' | grep -v _library.h)
forbid 'MPI is for the files named mpi_*' '#include <mpi' $(git ls-files '*.h' '*.cpp' '*.cu' | grep -v /mpi_)
# Two types of one name in one namespace are undefined behaviour, and neither compiler nor linker says so: the linker takes one
# vector<Name>'s functions for both.
# shellcheck disable=SC2046  # file names without spaces
awk '
  FNR == 1 { depth = 0; within[0] = "" }
  /^namespace .*\{$/ { within[depth + 1] = within[depth] "::" ($2 == "{" ? FILENAME : $2); opened[++depth] = FNR }
  /^}  \/\/ namespace/ || (/^}$/ && depth > 0 && FNR == opened[depth] + 2) { --depth }
  /^(struct|class|union|enum|enum class) [A-Za-z_]+ .*\{/ {
    name = within[depth] "::" ($2 == "class" ? $3 : $2)
    if (name in first) { print FILENAME ":" FNR ": error: " name " is a type in " first[name] ", too"; bad = 1 }
    first[name] = FILENAME
  }
  END { exit bad }' $(git ls-files '*.h' '*.cuh' '*.cpp' '*.cu') || bad=1
exit $bad
