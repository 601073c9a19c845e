#!/bin/bash
# Runs the test suite: tests/unit and tests/ops on one process with 2 threads, every program of
# tests/par under mpirun on 1, 2 and 4 ranks (collectives and the process grid also on 8), every
# tests/e2e/*.sh. One line a test with its time, the output of those that fail, and a last line
# "N passed, N failed".
#
#   tests/run.sh [PATTERN...]    only tests whose name holds one of the patterns
#
# Environment: BUILD (folder), SAN (its sanitizers), MPIRUN, MD_TEST_RANKS ("1 2 4", for all of
# tests/par), MD_TEST_SCALE (time limits times this), MD_TALLY (file that gets "passed failed
# skipped").
# Exit status of an e2e script: 0 passed, 77 skipped (its last line says why), else failed.
set -u
cd "$(dirname "$0")/.." || exit 1

san=${SAN:-}
build=${BUILD:-build${san:+-${san//,/-}}}
scale=${MD_TEST_SCALE:-$([ -n "$san" ] && echo 6 || echo 1)}
export MD_TEST_SCALE=$scale # the scripts have limits too
patterns=("$@")
passed=0 failed=0 skipped=0
scratch=$(mktemp -d)
out=$scratch/out
trap 'rm -rf "$scratch"' EXIT

MD_HPC=$(realpath -m "$build/md_hpc")
export MD_HPC
export MPIRUN=${MPIRUN:-mpirun}
. tests/env.sh

selected() { # FILE NAME: there is such a file (a glob may match none) and the name is asked for
    [ -e "$1" ] || return 1
    [ ${#patterns[@]} = 0 ] && return 0
    local p
    for p in "${patterns[@]}"; do
        [[ $2 == *"$p"* ]] && return 0
    done
    return 1
}

# Number in the last cmocka line of this kind, lowest or highest over the ranks.
cmocka_count() { # WORD [r]
    sed -n "s/.*\[  *$1  *\] \([0-9][0-9]*\) test.*/\1/p" "$out" | sort "-n${2:-}" | head -n 1
}

# run NAME LIMIT COMMAND...: counts one test, or as many as cmocka says there were.
run() {
    local name=$1 limit=$(($2 * scale)) start=$EPOCHREALTIME rc ok bad skip
    shift 2
    timeout -k 10 "$limit" "$@" >"$out" 2>&1 </dev/null
    rc=$?
    ok=$(cmocka_count PASSED) bad=$(cmocka_count FAILED r) skip=$(cmocka_count SKIPPED)
    skip=${skip:-0}
    case $rc in
    0) ok=$((${ok:-1})) bad=0 ;;
    77) ok=0 bad=0 skip=1 ;;
    *) ok=${ok:-0} bad=${bad:-1} ;;
    esac
    [ "$rc" = 0 ] || [ "$rc" = 77 ] || [ "$bad" -gt 0 ] || bad=1
    passed=$((passed + ok)) failed=$((failed + bad)) skipped=$((skipped + skip))
    local seconds word=ok
    seconds=$(awk "BEGIN { printf \"%.1f\", $EPOCHREALTIME - $start }")
    [ "$skip" = 0 ] || word="ok, $skip skipped"
    [ "$rc" != 77 ] || word="skipped: $(tail -n 1 "$out")"
    [ "$bad" = 0 ] || word=FAILED
    [ "$rc" != 124 ] && [ "$rc" != 137 ] || word="FAILED: no end after $limit s"
    printf '%-44s %4d %7.1f s  %s\n' "$name" "$ok" "$seconds" "$word"
    [ "$bad" = 0 ] || sed 's/^/    /' "$out"
}

for source in tests/unit/test_*.c tests/ops/test_*.c; do
    name=${source#tests/} name=${name%.c}
    selected "$source" "$name" || continue
    OMP_NUM_THREADS=2 run "$name" 300 "$build/tests/$name"
done

# The cuda backend, compiled for the CPU where tests/emu is built.
if selected "$build/emu/test_emu" emu/test_emu; then
    run emu/test_emu 60 "$build/emu/test_emu"
fi
if selected "$build/emu/test_ops" ops/test_ops_emu; then
    MD_TEST_BACKEND=cuda MD_TEST_LIGHT=$([ -n "$san" ] && echo 60 || echo 1) \
        MD_TEST_ONCE=$([ -n "$san" ] && echo 1) run ops/test_ops_emu 300 "$build/emu/test_ops"
fi

# Under MPI whole stacks are needed, also through libraries without frame pointers, for suppressions
# that go by library; they cost time.
ASAN_OPTIONS=$ASAN_OPTIONS:fast_unwind_on_malloc=0

for source in tests/par/test_*.c; do
    name=${source#tests/} name=${name%.c}
    case $name in
    par/test_composition) ranks=$([ -n "$san" ] && echo 2 || echo "1 2 4 8") ;; # minutes of training
    par/test_comm* | par/test_topo) ranks="1 2 4 8" ;;
    *) ranks="1 2 4" ;;
    esac
    for np in ${MD_TEST_RANKS:-$ranks}; do
        selected "$source" "$name on $np" || continue
        OMP_NUM_THREADS=1 run "$name on $np" 180 "$MPIRUN" -np "$np" "$build/tests/$name"
    done
done

for script in tests/e2e/*.sh; do
    name=e2e/$(basename "$script" .sh)
    selected "$script" "$name" || continue
    OMP_NUM_THREADS=1 run "$name" 600 bash "$script"
done

[ -z "${MD_TALLY:-}" ] || echo "$passed $failed $skipped" >"$MD_TALLY"
echo "$passed passed, $failed failed$([ "$skipped" = 0 ] || echo ", $skipped skipped")"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
