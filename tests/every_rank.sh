#!/bin/bash
# Started by mpirun in place of a program: runs "$2"... and leaves its exit code in $1.RANK, so that a
# test sees how each rank ended. A rank waits for the others, because mpirun ends them all after the
# first that failed.
set -u
out=$1 rank=${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}} size=${OMPI_COMM_WORLD_SIZE:-${PMI_SIZE:-1}} rc=0
shift
"$@" || rc=$?
echo "$rc" >"$out.$rank"
for ((i = 0; i < 500; i++)); do
    for ((r = 0; r < size; r++)); do [ -s "$out.$r" ] || break; done
    [ "$r" -lt "$size" ] || break
    sleep 0.01
done
exit "$rc"
