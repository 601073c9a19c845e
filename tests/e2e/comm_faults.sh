#!/bin/bash
# A collective that fails on one rank ends the job at once, with the code of a lost peer and a line
# that names it; memory that one rank lacks while the process grid is made is an error on every rank.
# Nobody waits for a rank that has gone.
set -eu
cd "$(dirname "$0")/../.."
tests=$(dirname "$MD_HPC")/tests
limit=$((60 * ${MD_TEST_SCALE:-1}))
out=$(mktemp)
trap 'rm -f "$out"' EXIT

# run FAULT PROGRAM: on two ranks; leaves rc and the output.
run() {
    rc=0
    MD_FAULT=$1 timeout -k 10 "$limit" "${MPIRUN:-mpirun}" -np 2 "$tests/par/$2" >"$out" 2>&1 || rc=$?
}

fail() {
    cat "$out"
    echo "$*"
    exit 1
}

for r in 0 1; do
    for site in barrier allreduce bcast allgather reduce_scatter alltoallv exscan allreduce_begin \
        allgather_begin reduce_scatter_begin wait; do
        case $site in
        *_begin | wait) program=test_comm_begin ;;
        *) program=test_comm ;;
        esac
        run "comm.$site@rank$r#2" $program
        [ "$rc" = 69 ] || fail "comm.$site on rank $r: exit code $rc instead of 69"
        grep -q "rank $r: comm.$site failed in a group of [12] rank" "$out" ||
            fail "comm.$site on rank $r: not named"
    done
    # The world, then node group, tables and the three groups of the first grid.
    for n in 1 2 3 4 5 6 7 8; do
        run "base.alloc@rank$r#$n" test_topo
        [ "$rc" = 1 ] || fail "allocation $n on rank $r: exit code $rc instead of 1"
        [ "$n" = 1 ] || [ "$(grep -c 'out of memory' "$out")" = 2 ] ||
            fail "allocation $n on rank $r: not told by both ranks"
    done
done
echo ok
