#!/bin/sh
# dev/gpu_check.sh [OPTIONS]: everything that only a GPU can show, in one call of less than ten minutes: builds,
# tests, memory and race checks, every operation against its roofline, training steps, PyTorch in the same run, and
# curves against the CPU. Writes a report, Markdown and JSON, named after the GPU and the date. See --help.
#
# The machine needs CUDA 13, a C++ compiler and Python; whatever else the program needs travels in build/gpu-deps,
# which dev/gpu_bundle.sh makes on a machine with packages.
cd "$(dirname "$0")/.." || exit 1
exec python3 -B dev/gpu_check/run.py "$@"
