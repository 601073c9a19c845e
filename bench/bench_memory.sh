#!/bin/bash
# Peak memory of a rank as `md_hpc plan` predicts it, against what short runs on Fashion-MNIST measure
# (VmHWM after three steps). One line a case: ranks, predicted and measured MiB, their ratio.
#
#   bench/bench_memory.sh        Environment: BUILD (folder), MPIRUN
set -eu
cd "$(dirname "$0")/.." || exit 1
md_hpc=${BUILD:-build}/md_hpc
# shellcheck source=tests/env.sh
. tests/env.sh
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
store=$scratch/fashion_mnist.h5
teacher=$scratch/teacher.h5
"$md_hpc" convert --out "$store" /usr/share/datasets/fashion-mnist >/dev/null
"$md_hpc" weights import --out "$teacher" config/miniature/teacher >/dev/null

peak() { # RUN_DIR: most bytes of rank 0
    sed -n 's/.*"memory_bytes":\([0-9]*\).*/\1/p' "$1/metrics.jsonl" | tail -n 1
}

case_of() { # RANKS NAME key=value...
    local ranks=$1 name=$2 planned measured
    shift 2
    set -- data.train="$store" method.teacher.weights="$teacher" "$@"
    planned=$("$md_hpc" plan demo.cfg --ranks "$ranks" "$@" |
        awk '$1 == "peak" { print $2 * 1024 }')
    "${MPIRUN:-mpirun}" --bind-to none --oversubscribe -np "$ranks" "$md_hpc" demo.cfg \
        run.dir="$scratch/$name" train.max_steps=3 log.level=warn "$@"
    measured=$(peak "$scratch/$name")
    awk -v n="$name" -v r="$ranks" -v p="$planned" -v m="$measured" \
        'BEGIN { m /= 1048576; printf "%-10s %d ranks  plan %7.1f MiB  measured %7.1f MiB  ratio %.3f\n",
                 n, r, p, m, p / m }'
}

case_of 1 demo
case_of 2 demo2
case_of 2 wide model.width=256 model.layers=8 train.batch=256
vit_b16=(model.width=768 model.layers=12 model.heads=12 image.size=224 model.patch=16
    evaluate.resize=224 method.mask.min_block=16 train.batch=4)
case_of 1 vit_b16 "${vit_b16[@]}"
case_of 1 recomputed "${vit_b16[@]}" train.batch=16 train.recompute=12
case_of 2 vit_b16x2 "${vit_b16[@]}"
case_of 2 zero "${vit_b16[@]}" parallel.zero=1
case_of 4 zero4 "${vit_b16[@]}" parallel.zero=1
case_of 2 tensor "${vit_b16[@]}" parallel.tensor=2
case_of 2 sequence "${vit_b16[@]}" parallel.tensor=2 parallel.sequence=true
case_of 4 all "${vit_b16[@]}" parallel.tensor=2 parallel.sequence=true parallel.zero=1
case_of 4 tensor4 "${vit_b16[@]}" parallel.tensor=4
