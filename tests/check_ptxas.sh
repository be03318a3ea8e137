#!/bin/sh
# tests/check_ptxas.sh [BUILD]: compiles every CUDA half for all GPUs that the program supports and holds what ptxas
# says of each kernel against tests/ptxas_budgets.txt: registers, static shared memory, and no spills in any. Then
# links the whole program. Needs no GPU. Exit status 77 without nvcc.
set -u
build=${1:-build/cuda}
cd "$(dirname "$0")/.." || exit 1
command -v "${NVCC:-nvcc}" >/dev/null 2>&1 || { echo 'nvcc is not installed: kernels not compiled for GPUs'; exit 77; }

# shellcheck disable=SC2086  # MAKE may carry options
${MAKE:-make} -j"$(nproc)" DEVICE=cuda BUILD="$build" "$build/train_gpt" "$build/dev/lab/gemm_wgmma.cu.o" || exit 1

# One line for each kernel and architecture: arch, registers, shared bytes, spilled bytes, name.
logs=$(find "$build" -name '*.cu.o.ptxas')
[ -n "$logs" ] || { echo "no ptxas logs in $build: the rule for .cu files in the Makefile must write them" >&2; exit 1; }
# shellcheck disable=SC2086
awk '
  /Compiling entry function/ { split($0, quoted, "\x27"); name = quoted[2]; arch = quoted[4]; spill = 0 }
  /bytes spill stores/ && name != "" { for (i = 2; i <= NF; ++i) if ($i == "spill") spill += $(i - 2) }
  /Used [0-9]+ registers/ && name != "" {
    shared = 0
    for (i = 2; i <= NF; ++i) {
      if ($i ~ /^registers/) registers = $(i - 1)
      if ($i ~ /^smem/) shared = $(i - 2)
    }
    print arch, registers, shared, spill, name
    name = ""
  }' $logs | c++filt | sed 's/(anonymous namespace):://g; s/ void / /' |
  awk -v budgets=tests/ptxas_budgets.txt '
    BEGIN {
      while ((getline line < budgets) > 0)
        if (line !~ /^#/ && split(line, field, /[ \t]+/) >= 3) {
          pattern[++rules] = field[1]; most_registers[rules] = field[2]; most_shared[rules] = field[3]
        }
      printf "%-7s %9s %9s %7s  %s\n", "arch", "registers", "shared", "spills", "kernel"
    }
    {
      name = $5
      for (i = 6; i <= NF; ++i) name = name " " $i
      sub(/\(.*/, "", name)
      for (rule = 1; rule <= rules && name !~ pattern[rule]; ++rule) {}
      why = ""
      if ($4 > 0) why = why " spills"
      if (rule > rules) why = why " no-budget"
      else {
        if ($2 > most_registers[rule]) why = why " registers>" most_registers[rule]
        if ($3 > most_shared[rule]) why = why " shared>" most_shared[rule]
      }
      printf "%-7s %9d %9d %7d  %s\n", $1, $2, $3, $4, name
      if (why != "") failed[++bad] = $1 " " name ":" why
    }
    END {
      for (i = 1; i <= bad; ++i) print "FAILED " failed[i]
      printf "%d kernels, %d beyond their budgets\n", NR, bad
      exit bad > 0 || NR == 0
    }'
