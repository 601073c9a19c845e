#!/bin/bash
# What only a GPU can show: the ops in fp32 and bf16, training beside the cpu backend, grids of ranks
# on one GPU, NCCL, restarts, and the checks of compute-sanitizer.
#
#   tests/gpu/gpu_test.sh [PATTERN...]     only lines whose name holds one of the patterns
#
# One line a test as it ends: "ok", "skipped" with the reason, or "FAILED" with its output; last line
# "N passed, N failed". The same in $BUILD/gpu_test.json.
#
# Environment: BUILD, MPIRUN, MD_GPU_JOBS (tests at once; one for every four cores, at most 6),
# MD_GPU_SECONDS (570: no test starts later, which fails), MD_GPU_STANDIN=1 (the cuda backend of this
# build needs no GPU), MD_SANITIZER (compute-sanitizer). Exit status: 0 all passed or were skipped for
# lack of what they need, 1, or 69: there is no GPU. A signal ends all tests.
set -u
cd "$(dirname "$0")/../.." || exit 1
build=${BUILD:-build}
MD_HPC=$(realpath -m "$build/md_hpc")
export MD_HPC
export MPIRUN=${MPIRUN:-mpirun}
sanitizer=${MD_SANITIZER:-compute-sanitizer}
patterns=("$@")
jobs=$(($(getconf _NPROCESSORS_ONLN) / 4))
jobs=${MD_GPU_JOBS:-$((jobs < 1 ? 1 : jobs > 6 ? 6 : jobs))}
slow=$((jobs > 1 ? 2 : 1)) # what a test takes when others run beside it
results=$(mktemp -d)       # of each test its output, OUT, and a line of the report, OUT.json

# end_tree PID: it and all that it started; what timeout starts is in process groups of its own.
end_tree() {
    local child children
    read -ra children < <(cat "/proc/$1/task/"*/children 2>/dev/null)
    for child in "${children[@]}"; do
        end_tree "$child"
    done
    kill -TERM "$1" 2>/dev/null
}

ended() { # EXIT_STATUS
    local job
    trap '' INT TERM HUP
    for job in $(jobs -p); do
        end_tree "$job"
    done
    wait
    exit "$1"
}
trap 'rm -rf "$results"' EXIT
trap 'ended 130' INT
trap 'ended 143' TERM HUP

gpus() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
}

selected() {
    [ ${#patterns[@]} = 0 ] && return
    local p
    for p in "${patterns[@]}"; do
        [[ $1 != *"$p"* ]] || return 0
    done
    return 1
}

# Status of a test: 0 passed, 77 skipped (its last line says why), else failed.
skip() {
    echo "$*"
    exit 77
}

# run_test OUT NAME COMMAND...: the command in a subshell, so that whatever ends it ends it alone.
run_test() {
    local out=$1 name=$2 start=$EPOCHREALTIME rc=0 seconds word=ok result=passed
    shift 2
    if [ "$SECONDS" -ge "${MD_GPU_SECONDS:-570}" ]; then
        echo "no time was left for it" >"$out"
        rc=1
    else
        (set -e && "$@") >"$out" 2>&1 </dev/null
        rc=$?
    fi
    case $rc in
    0) ;;
    77) result=skipped word="skipped: $(tail -n 1 "$out")" ;;
    *) result=failed word=FAILED$'\n'$(tail -n 40 "$out" | sed 's/^/    /') ;;
    esac
    seconds=$(awk "BEGIN { printf \"%.1f\", $EPOCHREALTIME - $start }")
    printf '{"name": "%s", "result": "%s", "seconds": %s}\n' "$name" "$result" "$seconds" >"$out.json"
    flock "$results" printf '%-44s %7.1f s  %s\n' "$name" "$seconds" "$word"
}

# check NAME COMMAND...: starts a test as soon as there is room for it.
started=0
check() {
    selected "$1" || return 0
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
    started=$((started + 1))
    run_test "$results/$(printf '%03d' "$started")" "$@" &
}

# ---- ops ----

ops() {
    MD_TEST_BACKEND=cuda timeout $((200 * slow)) "$build/tests/ops/test_ops"
}

backend() {
    timeout $((60 * slow)) "$build/tests/ops/test_backend"
}

# ---- training: each begins with a scratch folder of its own ----

begin() {
    limit=$((100 * slow))
    # shellcheck source=tests/tiny_run.sh
    . tests/tiny_run.sh
}

on_gpu=(backend=cuda precision=fp32 parallel.comm=mpi)

fp32_as_cpu() {
    begin
    done_well 1 cpu backend=cpu
    done_well 1 gpu "${on_gpu[@]}"
    near cpu gpu
}

# bf16 keeps 8 bits: activations are off by up to 2^-8 each, their means by less. A loss is a mean over
# thousands of elements; a gradient norm shrinks with every term that is rounded away.
bf16_as_cpu() {
    begin
    done_well 1 cpu backend=cpu
    done_well 1 gpu backend=cuda precision=bf16 parallel.comm=mpi
    paste <(curve cpu) <(curve gpu) | awk '
        { d = $2 > $6 ? $2 - $6 : $6 - $2; e = $3 > $7 ? $3 - $7 : $7 - $3 }
        /null/ || $1 != $5 || d > 0.02 * $2 || e > 0.1 * $3 || $4 != $8 {
            print "step " $1 ": loss " $2, $6, " norm " $3, $7; bad = 1
        }
        NR == 1 { first = $6 }
        { last = $6 }
        END { exit bad || NR == 0 || last > 0.98 * first }' || fail 'bf16 is not near fp32, or learns nothing'
}

# Passes that are all alike, because nothing is skipped, are recorded and replayed.
recorded_as_cpu() {
    begin
    done_well 1 cpu backend=cpu model.drop_path_mode=mask
    done_well 1 gpu "${on_gpu[@]}" model.drop_path_mode=mask
    near cpu gpu
}

same_twice() { # PRECISION [key=value...]
    begin
    done_well 1 one backend=cuda precision="$1" parallel.comm=mpi "${@:2}"
    done_well 1 two backend=cuda precision="$1" parallel.comm=mpi "${@:2}"
    same one two
}

# Blocks that are run again before their backward pass make the same bits.
recomputed() { # key=value...
    begin
    done_well 1 kept backend=cuda precision=bf16 parallel.comm=mpi "$@"
    done_well 1 again backend=cuda precision=bf16 parallel.comm=mpi "$@" train.recompute=2
    same kept again
}

grid() { # RANKS key=value...: as one rank, whatever the grid
    begin
    local ranks=$1
    shift
    done_well 1 one "${on_gpu[@]}"
    done_well "$ranks" many "${on_gpu[@]}" "$@"
    near one many
}

resumed() { # PRECISION: stopped after 10 steps and gone on, the curve is that of a run in one piece
    begin
    local keys=(backend=cuda precision="$1" parallel.comm=mpi)
    done_well 1 whole "${keys[@]}"
    done_well 1 parts "${keys[@]}" train.max_steps=10
    done_well 1 parts "${keys[@]}"
    same whole parts
}

# The program says that it has no NCCL, where it has none.
without_nccl() {
    grep -qiE 'nccl.*(not in this|was not built|without|no nccl)|no nccl' "$log"
}

nccl_one() {
    begin
    done_well 1 mpi "${on_gpu[@]}"
    tiny 1 nccl backend=cuda precision=fp32 parallel.comm=nccl
    [ "$rc" = 0 ] || ! without_nccl || skip 'this build has no NCCL'
    [ "$rc" = 0 ] || fail "exit code $rc"
    same mpi nccl
}

nccl_two() {
    [ "$(gpus | wc -l)" -ge 2 ] || skip 'one GPU only'
    unset CUDA_VISIBLE_DEVICES
    begin
    done_well 1 one "${on_gpu[@]}"
    tiny 2 two backend=cuda precision=fp32 parallel.comm=nccl
    [ "$rc" = 0 ] || ! without_nccl || skip 'this build has no NCCL'
    [ "$rc" = 0 ] || fail "exit code $rc"
    near one two
}

# ---- compute-sanitizer ----

sanitized() { # TOOL COMMAND...
    local tool=$1
    shift
    command -v "$sanitizer" >/dev/null || skip "no $sanitizer"
    timeout $((150 * slow)) "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all "$@"
}

sanitized_ops() {
    MD_TEST_BACKEND=cuda MD_TEST_LIGHT=1 sanitized "$1" "$build/tests/ops/test_ops"
}

sanitized_training() {
    begin
    sanitized "$1" "$MD_HPC" "$scratch/tiny.cfg" "run.dir=$scratch/run" backend=cuda \
        precision=bf16 train.max_steps=2
}

count() { # RESULT
    cat "$results"/*.json 2>/dev/null | grep -c "\"result\": \"$1\""
}

report() {
    local passed failed skipped
    passed=$(count passed) skipped=$(count skipped)
    failed=$((started - passed - skipped)) # also what left no line
    {
        printf '{"gpu": "%s", "program": "%s", "passed": %d, "failed": %d, "skipped": %d, "tests": [\n' \
            "$(gpus | head -n 1)" "$("$MD_HPC" version 2>/dev/null | awk '/^source/ { print $2 }')" \
            "$passed" "$failed" "$skipped"
        cat "$results"/*.json 2>/dev/null | sed '$!s/$/,/'
        echo ']}'
    } >"$build/gpu_test.json"
    echo "$passed passed, $failed failed$([ "$skipped" = 0 ] || echo ", $skipped skipped")"
    [ "$failed" = 0 ] && [ "$passed" -gt 0 ]
}

if [ -z "$(gpus)" ] && [ "${MD_GPU_STANDIN:-0}" != 1 ]; then
    echo 'gpu_test: nvidia-smi shows no GPU'
    exit 69
fi
gpus
# Ranks of one node share a GPU only where it is the only one they see.
CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}

# The longest tests: last where one runs at a time, so that time is left for the others, else first.
sanitizers() {
    check 'racecheck: ops' sanitized_ops racecheck
    check 'memcheck: ops' sanitized_ops memcheck
    check 'memcheck: training' sanitized_training memcheck
}

[ "$jobs" = 1 ] || sanitizers
check 'ops in fp32 and bf16' ops
check 'backend' backend
check 'training in fp32 as on the cpu' fp32_as_cpu
check 'training in bf16 near the cpu' bf16_as_cpu
check 'recorded steps, fp32' recorded_as_cpu
check 'the same bits twice, recorded steps' same_twice bf16 model.drop_path_mode=mask
check 'the same bits twice, fp32' same_twice fp32
check 'the same bits twice, bf16' same_twice bf16
check 'recomputed, bf16' recomputed
check 'recomputed, recorded steps' recomputed model.drop_path_mode=mask
check 'data 2, one GPU' grid 2
check 'data 2 x tensor 2, one GPU' grid 4 parallel.tensor=2
check 'data 2 x tensor 2, sequence, ZeRO-1' grid 4 parallel.tensor=2 parallel.sequence=true parallel.zero=1
check 'micro-batches' grid 1 train.micro_batch=4
check 'NCCL, one rank' nccl_one
check 'NCCL, two GPUs' nccl_two
check 'resumed, fp32' resumed fp32
check 'resumed, bf16' resumed bf16
[ "$jobs" != 1 ] || sanitizers
wait
report
