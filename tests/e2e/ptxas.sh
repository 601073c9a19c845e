#!/bin/bash
# The kernels as nvcc compiles them, where it is installed: no spills, no more registers than the table.
cd "$(dirname "$0")/../.." || exit 1
exec tests/cuda/ptxas.sh
