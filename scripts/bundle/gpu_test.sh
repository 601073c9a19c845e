#!/bin/bash
# Tests of this bundle on the GPU of this machine: tests/gpu/gpu_test.sh says what they are.
cd "$(dirname "$0")" || exit 1
# shellcheck source=scripts/bundle/env.sh
. ./env.sh
BUILD=build MPIRUN=bin/mpirun exec tests/gpu/gpu_test.sh "$@"
