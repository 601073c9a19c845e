#!/bin/bash
# A checkpoint of any grid is the same state on any other: written by 8 ranks (tensor 4, data 2,
# sequence, ZeRO), read and written again by 1, 2, 6 and 8, its hash stays; and training goes on from
# it as if nothing had happened.
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh
limit=$((90 * ${MD_TEST_SCALE:-1}))
sed -i 's/heads = 2/heads = 4/; s/batch = 16/batch = 24/; s/max_steps = 20/max_steps = 8/
    s/every = 5/every = 4/' "$scratch/tiny.cfg"
wide=(parallel.tensor=4 parallel.sequence=true parallel.zero=1)

hash_of() { # RUN STEP
    "$MD_HPC" checkpoint info "$scratch/$1/checkpoints/step-0000000$2.h5" |
        sed -n 's/^ *state hash *//p'
}

done_well 8 whole "${wide[@]}"
whole whole 8
first=$(hash_of whole 4)
[ -n "$first" ] || fail "no state hash"
[ "$first" != "$(hash_of whole 8)" ] || fail "the state of steps 4 and 8 has one hash"

# hop RANKS RUN FROM [key=value...]: a run that begins with step 4 of another one and ends there.
hop() {
    local n=$1 run=$2 from=$3
    shift 3
    done_well "$n" "$run" train.max_steps=4 \
        "checkpoint.resume=$scratch/$from/checkpoints/step-00000004.h5" "$@"
    [ "$(hash_of "$run" 4)" = "$first" ] || fail "$run: the state's hash is $(hash_of "$run" 4)"
}
hop 1 on_1 whole
hop 2 on_2 on_1 parallel.tensor=2
hop 6 on_6 on_2 parallel.tensor=2 parallel.zero=1
hop 8 on_8 on_6 "${wide[@]}"
hop 4 on_4 on_8 parallel.zero=1

# Each goes on to step 8: the curve is that of the whole run from step 5 on.
goes_on() { # RANKS RUN [key=value...]
    done_well "$@"
    diff <(curve "$2" | cut -d' ' -f1) <(seq 5 8) || fail "$2 has not steps 5 to 8"
    sed -n '5,$p' "$scratch/whole/metrics.jsonl" >"$scratch/rest"
    mkdir -p "$scratch/rest_of_whole" && mv "$scratch/rest" "$scratch/rest_of_whole/metrics.jsonl"
    near rest_of_whole "$2"
}
goes_on 1 on_1
goes_on 6 on_6 parallel.tensor=2 parallel.zero=1
goes_on 8 on_8 "${wide[@]}"
same rest_of_whole on_8
echo ok
