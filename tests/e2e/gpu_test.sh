#!/bin/bash
# How tests/gpu/gpu_test.sh reports: what passes, fails, is skipped and finds no time, several at a
# time; and that a signal ends its tests. The tests that it starts are stand-ins for itself to watch.
set -eu
cd "$(dirname "$0")/../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export BUILD=$scratch MD_GPU_STANDIN=1
mkdir -p "$scratch/tests/ops"

fail() {
    echo "gpu_test: $*"
    cat "$scratch/out"
    exit 1
}

# stand_in NAME COMMAND: what a test runs.
stand_in() {
    printf '#!/bin/bash\n%s\n' "$2" >"$scratch/tests/ops/$1"
    chmod +x "$scratch/tests/ops/$1"
}

# reports STATUS LAST_LINE -- LINES...: runs these lines of it.
reports() {
    local want=$1 last=$2 rc=0
    shift 3
    bash tests/gpu/gpu_test.sh "$@" >"$scratch/out" 2>&1 || rc=$?
    [ "$rc" = "$want" ] || fail "exit code $rc, not $want: $*"
    [ "$(tail -n 1 "$scratch/out")" = "$last" ] || fail "the last line is not $last"
}

lines=(backend 'ops in' 'NCCL, two')
stand_in test_backend 'sleep 0.2'
stand_in test_ops 'echo words of the ops; exit 3'
for jobs in 1 3; do
    export MD_GPU_JOBS=$jobs
    reports 1 '1 passed, 1 failed, 1 skipped' -- "${lines[@]}"
    grep -q '^    words of the ops' "$scratch/out" || fail 'what failed says nothing'
    grep -q '"name": "backend", "result": "passed"' "$scratch/gpu_test.json" || fail 'no report'
    [ "$(grep -c '"result"' "$scratch/gpu_test.json")" = 3 ] || fail 'not three tests in the report'
done
stand_in test_ops true
reports 0 '2 passed, 0 failed, 1 skipped' -- "${lines[@]}"
MD_GPU_SECONDS=0 reports 1 '0 passed, 3 failed' -- "${lines[@]}"
reports 1 '0 passed, 0 failed' -- 'no such line'

# ---- a signal ends what runs ----
stand_in test_ops "echo \$\$ >$scratch/ops.pid; exec sleep 60"
stand_in test_backend "echo \$\$ >$scratch/backend.pid; exec sleep 60"
bash tests/gpu/gpu_test.sh backend 'ops in' >"$scratch/out" 2>&1 &
job=$!
for ((i = 0; i < 100; i++)); do
    [ ! -s "$scratch/ops.pid" ] || [ ! -s "$scratch/backend.pid" ] || break
    sleep 0.1
done
kill -TERM "$job"
rc=0
wait "$job" || rc=$?
[ "$rc" = 143 ] || fail "ended by a signal with $rc"
for pid in "$(cat "$scratch/ops.pid")" "$(cat "$scratch/backend.pid")"; do
    ! kill -0 "$pid" 2>/dev/null || fail "process $pid goes on"
done
echo ok
