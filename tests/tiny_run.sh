# A training run of seconds, sourced by tests/e2e/*.sh from the root of the repository: an image store
# of noise and a small model with everything in it that depends on the sample, the position in the
# batch or the step (crops, jitter, masks, drop path, relative positions).
# shellcheck shell=bash
. tests/env.sh
export OMP_NUM_THREADS=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
log=$scratch/log rc=0 wrap=()

fail() {
    echo "$(basename "$0" .sh): $*"
    [ ! -e "$log" ] || cat "$log"
    exit 1
}

# word N: the 32 bits of a big-endian number.
word() {
    local hex
    printf -v hex '%08x' "$1"
    printf '%b' "\\x${hex:0:2}\\x${hex:2:2}\\x${hex:4:2}\\x${hex:6:2}"
}

# store FILE COUNT: an image store of 16 x 16 pictures, by way of IDX. Their pixels are the bytes of
# source files, a noise that is there on every machine, again and again until there are enough.
store() {
    local idx=$scratch/idx i
    rm -rf "$idx" && mkdir "$idx"
    {
        word 0x803 && word "$2" && word 16 && word 16
        while cat io/*.c src/*.c; do :; done 2>/dev/null | head -c $((256 * $2))
    } >"$idx/train-images-idx3-ubyte"
    {
        word 0x801 && word "$2"
        for ((i = 0; i < $2; i++)); do printf '%b' "\\x0$((i % 10))"; done
    } >"$idx/train-labels-idx1-ubyte"
    "$MD_HPC" convert --force --out "$1" "$idx" >"$log" 2>&1 || fail "no store $1"
}

# 96 images in batches of 16: 6 steps an epoch, 20 steps. The learning rate is high enough for the
# loss to fall by a tenth.
cat >"$scratch/tiny.cfg" <<END
threads = 1;
run = { seed = 3; };
data = { train = "$scratch/tiny.h5"; workers = 1; };
image = { size = 16; };
augment = { crop_min = 0.6; };
model = { width = 32; layers = 2; heads = 2; patch = 4; drop_path = 0.3; };
method = {
    teacher = { kind = "pixel"; };
    target = { norm = "patch_norm"; };
    mask = { min_block = 2; };
};
optim = { lr = 4e-3; warmup_epochs = 0.5; };
train = { epochs = 10.0; max_steps = 20; batch = 16; };
checkpoint = { every = 5; };
END
store "$scratch/tiny.h5" 96

# tiny RANKS RUN [key=value...]: trains in the run directory $scratch/RUN; $rc is the exit code, the
# output is in $log. Ends a test when the run does not end. Variables: config, a command that
# starts the program (the array wrap), seconds until it must have ended (limit).
tiny() {
    local n=$1 run=$2 end=$((SECONDS + ${limit:-60}))
    shift 2
    rc=0
    timeout -k 5 "${limit:-60}" "$MPIRUN" -np "$n" "${wrap[@]}" "$MD_HPC" \
        "$scratch/${config:-tiny.cfg}" "run.dir=$scratch/$run" "$@" >"$log" 2>&1 </dev/null || rc=$?
    [ $SECONDS -lt $end ] || fail "no end: $n ranks, $run $*"
}

# done_well RANKS RUN [key=value...]: the same, and it must finish.
done_well() {
    tiny "$@"
    [ "$rc" = 0 ] || fail "exit code $rc: $*"
}

# curve RUN: what may not depend on how the work was done: "step loss grad_norm bad_images" a line.
curve() {
    sed -n 's/.*"step":\([0-9]*\),.*"loss":\([^,]*\),"grad_norm":\([^,]*\),.*"bad_images":\([0-9]*\),.*/\1 \2 \3 \4/p' \
        "$scratch/$1/metrics.jsonl"
}

# same RUN RUN: bit for bit (metrics.jsonl has every digit of a double).
same() {
    diff <(curve "$1") <(curve "$2") || fail "$1 and $2 differ"
}

# near RUN RUN: every step's loss within 1e-5 and gradient norm within 1e-4: rounding grows from step to
# step, and how fast depends on the pictures, which are this folder's sources.
near() {
    paste <(curve "$1") <(curve "$2") | awk -v a="$1" -v b="$2" '
        { d = $2 > $6 ? $2 - $6 : $6 - $2; e = $3 > $7 ? $3 - $7 : $7 - $3 }
        /null/ || $1 != $5 || d > 1e-5 * $2 || e > 1e-4 * $3 || $4 != $8 {
            print a, b " at step " $1 ": " $2, $6, " norm " $3, $7; bad = 1
        }
        END { exit bad || NR == 0 }' || fail "$1 and $2 differ"
}

# whole RUN STEPS: metrics.jsonl has every step once, in order.
whole() {
    diff <(curve "$1" | cut -d' ' -f1) <(seq "$2") || fail "$1 has not every step once"
}

# start RANKS RUN [key=value...]: the same in the background; $job is mpirun.
start() {
    local n=$1 run=$2
    shift 2
    timeout -k 5 "${limit:-60}" "$MPIRUN" -np "$n" "$MD_HPC" "$scratch/tiny.cfg" \
        "run.dir=$scratch/$run" "$@" >"$log" 2>&1 </dev/null &
    job=$!
}

# below PID: its children, theirs, and so on.
below() {
    local p all
    read -ra all <<<"$(cat "/proc/$1"/task/*/children 2>/dev/null | tr '\n' ' ')"
    for p in "${all[@]}"; do
        echo "$p"
        below "$p"
    done
}

# ranks_of PID: the ranks below it.
ranks_of() {
    local p
    for p in $(below "$1"); do
        [ "$(readlink "/proc/$p/exe")" != "$MD_HPC" ] || echo "$p"
    done
}

# until_true SECONDS COMMAND...: polls.
until_true() {
    local i n=$(($1 * 50))
    shift
    for ((i = 0; i < n; i++)); do
        "$@" && return
        sleep 0.02
    done
    fail "waited in vain for: $*"
}

# at_step RUN N: metrics.jsonl has that step.
at_step() {
    grep -qs "\"step\":$2," "$scratch/$1/metrics.jsonl"
}

# asleep: some rank of the job in the background has stopped itself (MD_FAULT=site:stop).
asleep() {
    local p
    for p in $(ranks_of "$job"); do
        ! grep -qs '^State:.T' "/proc/$p/status" || return 0
    done
    return 1
}

# send SIGNAL: to every process whose number is on stdin, by the shell's own kill.
send() {
    local p
    while read -r p; do
        kill "-$1" "$p"
    done
}

# wake: all go on.
wake() {
    ranks_of "$job" | send CONT
}

# ended CODE: the run in the background ends with this code.
ended() {
    rc=0
    wait "$job" || rc=$?
    [ "$rc" = "$1" ] || fail "exit code $rc instead of $1"
}

# says WORDS...: each stands in the output.
says() {
    local words
    for words in "$@"; do grep -qF -- "$words" "$log" || fail "the output lacks: $words"; done
}
