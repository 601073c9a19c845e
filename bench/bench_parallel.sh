#!/bin/bash
# Whole training steps of one case on one rank with all threads against several ranks with one thread
# each, interleaved, as ratios of images a second; then what the ranks send, beside the formulas.
#
#   bench/bench_parallel.sh [CASE]       default vit_b16; RANKS (2), PAIRS (5), STEPS (5)
#
# Each form gets the same batch. Environment: BUILD (folder), MPIRUN.
set -eu
cd "$(dirname "$0")/.." || exit 1
md_hpc=${BUILD:-build}/md_hpc
case=${1:-vit_b16} ranks=${RANKS:-2} pairs=${PAIRS:-5} steps=${STEPS:-5}
# shellcheck source=tests/env.sh
. tests/env.sh
# As on any machine but a container: a message between ranks of a node is one copy.
unset OMPI_MCA_btl_vader_single_copy_mechanism

forms=("" "parallel.zero=1" "parallel.tensor=$ranks"
    "parallel.tensor=$ranks parallel.sequence=true")
names=("data" "data, ZeRO-1" "tensor" "tensor, sequence")

rate() { # RANKS THREADS key=value...: images a second, median step
    local n=$1 threads=$2
    shift 2
    OMP_NUM_THREADS=$threads "${MPIRUN:-mpirun}" --bind-to none --oversubscribe -np "$n" "$md_hpc" \
        bench step --case "$case" --threads "$threads" --steps "$steps" --warmup 1 "$@" |
        sed -n 's/.*"images_per_second_median": \([0-9.]*\).*/\1/p'
}

results=$(mktemp)
trap 'rm -f "$results"' EXIT
for ((i = 0; i < pairs; i++)); do
    one=$(rate 1 "$ranks")
    for k in "${!forms[@]}"; do
        read -ra keys <<<"${forms[k]}"
        echo "$k $one $(rate "$ranks" 1 "${keys[@]}")" >>"$results"
    done
done
echo "$case: 1 rank x $ranks threads against $ranks ranks x 1 thread, $pairs interleaved runs of $steps steps"
echo 'form                 1 rank   ranks   ratio: median (range)'
for k in "${!forms[@]}"; do
    awk -v k="$k" '$1 == k { print $3 / $2, $2, $3 }' "$results" | sort -n |
        awk -v name="${names[k]}" '{ r[NR] = $1; a[NR] = $2; b[NR] = $3 }
            END { m = int((NR + 1) / 2)
                  printf "%-18s %8.2f %7.2f   %.3f (%.3f to %.3f)\n", name, a[m], b[m], r[m], r[1], r[NR] }'
done
for k in "${!forms[@]}"; do
    read -ra keys <<<"${forms[k]}"
    printf '\n%s\n' "${names[k]}"
    OMP_NUM_THREADS=1 "${MPIRUN:-mpirun}" --bind-to none --oversubscribe -np "$ranks" "$md_hpc" \
        bench comm --case "$case" --threads 1 --steps 2 --warmup 1 "${keys[@]}" |
        sed '/^bucket/,/^ *[0-9]/d; /^ *[0-9][0-9]* /d; /^$/d'
done
