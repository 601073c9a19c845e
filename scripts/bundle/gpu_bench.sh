#!/bin/bash
# Measurements of this bundle on the GPU of this machine: bench/bench_gpu.sh says what they are.
cd "$(dirname "$0")" || exit 1
# shellcheck source=scripts/bundle/env.sh
. ./env.sh
BUILD=build exec bench/bench_gpu.sh "$@"
