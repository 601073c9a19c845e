#!/bin/bash
# The two-minute tour, run by `make demo`: pictures become an image store, safetensors a teacher, a
# small ViT is pretrained on two MPI ranks, the run is stopped by a signal as a batch system would and
# started again, and the last lines say what came out: the loss, and how often a picture's nearest
# neighbours tell its class, before and after. Everything is written under runs/.
#
# Environment: MPIRUN, MD_DEMO_RANKS (2), MD_DEMO_DATA (folder with Fashion-MNIST's files).
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=scripts/mpi_env.sh
. scripts/mpi_env.sh
mpirun=${MPIRUN:-mpirun} ranks=${MD_DEMO_RANKS:-2}
store=runs/fashion_mnist.h5 run=runs/demo teacher=runs/fashion_teacher.h5
metrics=$run/metrics.jsonl
start=$SECONDS

fail() {
    echo "demo: $*" >&2
    exit 1
}

say() {
    if [ -t 1 ]; then
        printf '\n\033[1m%s\033[0m\n' "$*"
    else
        printf '\n%s\n' "$*"
    fi
}

# Value of a key in the last line of metrics.jsonl, or nothing.
last() {
    tail -n 1 "$metrics" 2>/dev/null | sed -n "s/.*\"$1\": *\([-0-9.e+]*\).*/\1/p"
}

data=${MD_DEMO_DATA:-}
if [ -z "$data" ]; then
    data=$(dpkg -L dataset-fashion-mnist 2>/dev/null | grep 'train-images' | head -n 1) || true
    data=${data%/*}
fi
[ -d "$data" ] || fail 'no Fashion-MNIST: apt-get install dataset-fashion-mnist, or set MD_DEMO_DATA'

mkdir -p runs
if [ ! -f "$store" ]; then
    say "1. pictures to an image store: md_hpc convert --out $store $data"
    "$mpirun" -np "$ranks" ./md_hpc convert --out "$store" "$data"
else
    say "1. the image store $store is there already"
fi

say "2. a teacher from safetensors: md_hpc weights import --out $teacher config/miniature/teacher"
rm -f "$teacher"
./md_hpc weights import --out "$teacher" config/miniature/teacher

# Per cent of the test pictures whose class their 20 nearest among 10,000 training pictures tell.
neighbours() { # NAME evaluate.from=...
    "$mpirun" -np "$ranks" ./md_hpc evaluate demo.cfg "data.train=$store" "run.dir=$run" \
        evaluate.kind=knn evaluate.knn_images=10000 "evaluate.output=runs/demo-$1" "${@:2}" >/dev/null ||
        fail "evaluation $1"
    sed -n 's/.*"top1": \([0-9.]*\).*/\1/p' "runs/demo-$1.json"
}
say '3. what the student is worth before: md_hpc evaluate demo.cfg evaluate.kind=knn evaluate.from=none'
before=$(neighbours before evaluate.from=none)
printf '%.1f %% of the test pictures are told by their nearest neighbours\n' "$before"

say "4. pretraining on $ranks ranks: mpirun -np $ranks ./md_hpc demo.cfg run.dir=$run"
rm -rf "$run"
"$mpirun" -np "$ranks" ./md_hpc demo.cfg "data.train=$store" "run.dir=$run" \
    "method.teacher.weights=$teacher" &
job=$!
trap 'kill $job 2>/dev/null || true' EXIT
stop_at=150
while kill -0 "$job" 2>/dev/null; do
    step=$(last step)
    [ "${step:-0}" -lt "$stop_at" ] || break
    sleep 0.2
done
kill -0 "$job" 2>/dev/null || fail 'the first run ended early'
say "5. the batch system calls: kill -USR1, as $(($(last step))) steps are done"
kill -USR1 "$job"
rc=0
wait "$job" || rc=$?
trap - EXIT
[ "$rc" = 75 ] || fail "expected exit code 75 (checkpointed, run me again), got $rc"

say '6. the same command again: it goes on where it stopped'
"$mpirun" -np "$ranks" ./md_hpc demo.cfg "data.train=$store" "run.dir=$run" \
    "method.teacher.weights=$teacher"

say '7. and after: md_hpc evaluate runs/demo evaluate.kind=knn'
after=$(neighbours after)

# Mean of a key over the first (head) or last (tail) 20 steps.
mean() { # head|tail KEY
    "$1" -n 20 "$metrics" | sed "s/.*\"$2\": *\([-0-9.e+]*\).*/\1/" |
        awk '{ sum += $1 } END { printf "%.4f", sum / NR }'
}
first=$(mean head loss) end=$(mean tail loss) speed=$(mean tail images_per_second)
checkpoint=$(find "$run/checkpoints" -name 'step-*.h5' | sort | tail -n 1)
awk "BEGIN { exit !($end < 0.6 * $first) }" || fail "the loss did not fall: $first to $end"
awk "BEGIN { exit !($after > $before) }" || fail "the features did not get better: $before to $after"
say "done in $((SECONDS - start)) s; more of it: mpirun -np $ranks ./md_hpc demo.cfg run.dir=runs/longer train.epochs=5"
printf 'nearest neighbours tell %.1f %% of the test pictures, before it was %.1f %%\n' "$after" "$before"
echo "loss $first -> $end, ${speed%.*} images/s on $ranks ranks, checkpoint $checkpoint;" \
    "next: README.md, \"A first real run\""
