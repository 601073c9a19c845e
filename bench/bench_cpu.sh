#!/bin/bash
# Compares whole training steps of this program with PyTorch on this machine's cores, interleaved so
# that both meet the same noise, and prints the ratios.
#
#   bench/bench_cpu.sh [CASE...]        cases: vit_b16 small (default: both)
#
# Two peers a case (bench/torch_peer.py): the fastest PyTorch with its own linear layers, and the
# fastest with the linear layers sent to PyTorch's oneDNN; which form is fastest is probed first.
#
# Environment: BUILD, MD_HPC (program), MD_BENCH_THREADS (2), MD_BENCH_PAIRS (5), MD_BENCH_STEPS (5
# timed steps a run), MD_BENCH_PYTHON (an interpreter with torch, and timm if it is to compete), else
# python3 where it has torch, else a virtual environment made in MD_BENCH_VENV ($BUILD/bench-venv)
# with pip. Every run's JSON line goes to $BUILD/bench_cpu.jsonl.
set -eu
cd "$(dirname "$0")/.."

build=${BUILD:-build}
program=${MD_HPC:-$build/md_hpc}
threads=${MD_BENCH_THREADS:-2}
pairs=${MD_BENCH_PAIRS:-5}
steps=${MD_BENCH_STEPS:-5}
venv=${MD_BENCH_VENV:-$build/bench-venv}
log=$build/bench_cpu.jsonl
cases=("$@")
[ ${#cases[@]} -gt 0 ] || cases=(vit_b16 small)

has() { "$1" -c "import $2" 2>/dev/null; }

find_python() {
    python=${MD_BENCH_PYTHON:-python3}
    has "$python" torch && return
    [ -z "${MD_BENCH_PYTHON:-}" ] || { echo "bench: $python cannot import torch" >&2 && exit 69; }
    python=$venv/bin/python
    has "$python" torch && return
    echo "bench: making $venv with torch and timm (a large download)" >&2
    python3 -m venv "$venv" || {
        echo "bench: python3 cannot make $venv: install python3-venv, or set MD_BENCH_PYTHON" >&2
        exit 69
    }
    "$venv/bin/pip" install --quiet torch timm
}

ours() { # CASE
    OMP_NUM_THREADS=$threads "$program" bench step --case "$1" --threads "$threads" \
        --steps "$steps" --warmup 2
}

peer() { # CASE STEPS FORM
    # shellcheck disable=SC2086 # a form is a list of options
    "$python" bench/torch_peer.py --case "$1" --threads "$threads" --steps "$2" --warmup 2 $3
}

rate() { # reads one JSON line
    "$python" -c 'import json, sys; print(json.load(sys.stdin)["images_per_second"])'
}

fastest() { # CASE FORM...: prints the form with the best rate
    local case=$1 best=0 chosen='' form now
    shift
    for form; do
        now=$(peer "$case" 3 "$form" | rate)
        awk "BEGIN { exit !($now > $best) }" && best=$now chosen=$form
    done
    echo "$chosen"
}

summary() { # CASE: of the lines "ours stock onednn" (images/s) on stdin
    awk -v name="$1" '
        function sort(v, n,   i, j, t) {
            for (i = 2; i <= n; i++)
                for (j = i; j > 1 && v[j] < v[j - 1]; j--) { t = v[j]; v[j] = v[j - 1]; v[j - 1] = t }
        }
        function middle(v, n) { return n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2 }
        { for (k = 1; k <= 3; k++) x[k, NR] = $k }
        END {
            for (k = 2; k <= 3; k++) {
                for (i = 1; i <= NR; i++) {
                    a[i] = x[1, i]; b[i] = x[k, i]; r[i] = x[1, i] / x[k, i]
                }
                sort(a, NR); sort(b, NR); sort(r, NR)
                printf "%-8s  %-14s  %8.2f  %8.2f   %.2f (%.2f to %.2f)\n", name,
                    k == 2 ? "torch" : "torch + oneDNN", middle(a, NR), middle(b, NR),
                    middle(r, NR), r[1], r[NR]
            }
        }'
}

find_python
mkdir -p "$build"
: >"$log"
forms=("--attention manual" "--attention sdpa")
results=()
for case in "${cases[@]}"; do
    candidates=("${forms[@]}")
    has "$python" timm && candidates+=("--model timm")
    stock=$(fastest "$case" "${candidates[@]}")
    tuned=$(fastest "$case" "${forms[@]/#/--linear onednn }")
    echo "$case: torch $stock; torch + oneDNN $tuned;" \
        "$pairs interleaved runs of $steps steps, $threads threads"
    rates=''
    for ((i = 1; i <= pairs; i++)); do
        for run in ours stock tuned; do
            case $run in
            ours) line=$(ours "$case") ;;
            stock) line=$(peer "$case" "$steps" "$stock") ;;
            tuned) line=$(peer "$case" "$steps" "$tuned") ;;
            esac
            echo "$line" >>"$log"
            rates+="$(echo "$line" | rate) "
        done
        rates+=$'\n'
    done
    results+=("$(printf '%s' "$rates" | summary "$case")")
done
echo
echo 'case      peer              md_hpc      peer   images/s, best step of a run; ratio: median (range)'
printf '%s\n' "${results[@]}"
