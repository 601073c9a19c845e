#!/bin/bash
# The kernels as nvcc compiles them, where it is installed: no spills, no more registers than the table.
cd "$(dirname "$0")/../.." || exit 1
logs=$(dirname "${MD_HPC:-build/md_hpc}")/cuda/kernels/cuda
[ -e "$logs/cuda_backend.log" ] || { echo 'this build is without CUDA' && exit 77; }
PTXAS_LOGS=$logs exec tests/cuda/ptxas.sh
