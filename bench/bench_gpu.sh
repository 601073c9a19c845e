#!/bin/bash
# Whole training steps of ViT-H/14 with its CLIP ViT-L/14 teacher on one GPU, in bf16, beside the same
# step in PyTorch (bench/bench_gpu.py), interleaved so that all meet the same clocks, and what the GPU
# can do at most. Prints a short table last. Fits in ten minutes.
#
#   bench/bench_gpu.sh [limits] [ours] [peer]        default: all three
#
# Parts that run alone add to the file of the parts before, and the table is made of all of it.
# Environment: BUILD, MD_HPC (program), MD_BENCH_PYTHON (python3; needs torch, and timm with
# MD_BENCH_MODEL=timm), MD_BENCH_BATCHES ("32 64 128"), MD_BENCH_STEPS (10), MD_BENCH_ROUNDS (1),
# MD_BENCH_FORMS ("eager compile"), MD_BENCH_MODE (of torch.compile), MD_BENCH_SECONDS (560: nothing
# starts later), MD_BENCH_KEYS (more keys for ours). Every run is a JSON line in $BUILD/bench_gpu.jsonl.
set -u
cd "$(dirname "$0")/.." || exit 1

build=${BUILD:-build}
program=${MD_HPC:-$build/md_hpc}
python=${MD_BENCH_PYTHON:-python3}
steps=${MD_BENCH_STEPS:-10}
rounds=${MD_BENCH_ROUNDS:-1}
read -ra batches <<<"${MD_BENCH_BATCHES:-32 64 128}"
read -ra forms <<<"${MD_BENCH_FORMS:-eager compile}"
read -ra keys <<<"${MD_BENCH_KEYS:-}"
log=$build/bench_gpu.jsonl
parts=" ${*:-limits ours peer} "
out=$(mktemp)
trap 'rm -f "$out"' EXIT

wants() { [[ $parts == *" $1 "* ]]; }

# record KEY BATCH COMMAND...: keeps the JSON lines that it prints, each with its key and batch. What
# fails or finds no time is said, and the rest goes on.
record() {
    local key=$1 batch=$2 left=$((${MD_BENCH_SECONDS:-560} - SECONDS))
    shift 2
    if [ "$left" -lt 5 ]; then
        echo "$key, batch $batch: no time was left"
        return
    fi
    timeout "$left" "$@" >"$out" 2>"$out.err" || {
        echo "$key, batch $batch: failed with $?"
        tail -n 5 "$out.err" "$out" | sed 's/^/    /'
    }
    rm -f "$out.err"
    grep '^{' "$out" | sed "s/^{/{\"key\": \"$key\", \"of\": $batch, /" | tee -a "$log" |
        cut -c 1-200
}

ours() { # BATCH
    record ours "$1" "$program" bench step --case vit_h14 --steps "$steps" --warmup 4 \
        backend=cuda precision=bf16 "train.batch=$1" "train.micro_batch=$1" "${keys[@]}"
}

peer() { # BATCH FORM
    record "$2" "$1" "$python" bench/bench_gpu.py step --form "$2" --batch "$1" --steps "$steps" \
        --mode "${MD_BENCH_MODE:-default}" --model "${MD_BENCH_MODEL:-lean}" --seconds 100
}

# Median over the runs of each key and batch. The nominal work of an image is what the model's shapes
# say without anything skipped: 1166.6 GFLOP; the peak is that of an H100 SXM in bf16, dense. HFU counts
# what ours computes, with the expected number of dropped paths: neither these nor what follows the last
# block at other tokens.
table() {
    awk '
        function field(name,   v) {
            if (!match($0, "\"" name "\": [0-9.]+")) return ""
            v = substr($0, RSTART, RLENGTH); sub(/.*: /, "", v); return v
        }
        function middle(list,   v, n, i, j, t) {
            n = split(list, v, " ")
            for (i = 2; i <= n; i++)
                for (j = i; j > 1 && v[j] + 0 < v[j - 1] + 0; j--) { t = v[j]; v[j] = v[j - 1]; v[j - 1] = t }
            return n == 0 ? "" : n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2
        }
        function number(x, form) { return x == "" ? "-" : sprintf(form, x) }
        function over(x, y) { return x == "" || y == "" ? "" : x / y }
        function mfu(x) { return x == "" ? "" : 100 * x * 1166.6e9 / 989.4e12 }
        match($0, /"key": "[a-z]+"/) {
            key = substr($0, RSTART + 8, RLENGTH - 9)
            rate = field("images_per_second_median")
            if (rate == "") next
            batch = field("of")
            if (!(batch in seen)) { seen[batch] = 1; order[++n] = batch }
            rates[key, batch] = rates[key, batch] " " rate
            done[key, batch] = done[key, batch] " " field("gflops_executed_median")
        }
        END {
            if (!n) exit
            print "images/s, median          ours      eager    compile   ours/eager ours/compile  MFU %: ours eager compile  HFU %: ours"
            for (i = 1; i <= n; i++) {
                b = order[i]; o = middle(rates["ours", b]); e = middle(rates["eager", b]); c = middle(rates["compile", b])
                printf "micro-batch %-10s %8s %10s %10s %12s %12s %12s %5s %7s %12s\n", b, number(o, "%.1f"),
                    number(e, "%.1f"), number(c, "%.1f"), number(over(o, e), "%.3f"), number(over(o, c), "%.3f"),
                    number(mfu(o), "%.1f"), number(mfu(e), "%.1f"), number(mfu(c), "%.1f"),
                    number(over(middle(done["ours", b]), 9894), "%.1f")
            }
        }' "$log"
}

# The ops that $out lists, each with its share of what was measured last: products and attention of
# 8192^3, what only moves memory of a copy of as many bytes, of which a small one is slower than a
# large one, too. Elsewhere than at the copies measured, time is on a line through two of them.
ops_table() {
    awk -v log_file="$log" '
        function field(line, name) {
            if (!match(line, "\"" name "\": [0-9.]+")) return 0
            line = substr(line, RSTART, RLENGTH); sub(/.*: /, "", line); return line + 0
        }
        function copy_us(bytes,   i) {
            if (copies < 2) return 0
            for (i = 2; i < copies && bytes > moved[i]; i++) ;
            return us[i] + (bytes - moved[i]) * (us[i] - us[i - 1]) / (moved[i] - moved[i - 1])
        }
        BEGIN { # every run of the limits begins with that product, and its copies end on a large one
            while ((getline line < log_file) > 0) {
                if (line ~ /"gemm 8192 8192 8192 bf16"/) { gemm = field(line, "tflops"); n = 0 }
                if (line !~ /"copy (of as much|on the device)/) continue
                new_us[++n] = 1e3 * field(line, "ms")
                new_moved[n] = 1e3 * new_us[n] * field(line, "gb_per_second")
                if (n > 1 && new_moved[n] <= new_moved[n - 1]) n--
                if (line !~ /"copy on the device/) continue
                for (copies = n; n > 0; n--) { us[n] = new_us[n]; moved[n] = new_moved[n] }
            }
        }
        /^{/ { next }
        $1 == "op" { print $0 "  of limit"; next }
        $1 == "all" { print; next }
        {
            each = substr($0, 65, 10) + 0; gbs = substr($0, 92, 10) + 0; tflops = substr($0, 102, 10) + 0
            share = tflops ? (gemm ? tflops / gemm : 0) : each ? copy_us(1e3 * each * gbs) / each : 0
            printf "%-111s%s\n", $0, share ? sprintf(" %9.2f", share) : ""
        }' "$out"
}

limits_table() {
    sed -n 's/.*"name": "\([^"]*\)", "ms": \([0-9.]*\)\(.*\)}/\1|\2 ms|\3/p' "$log" |
        sed 's/, "tflops": \([0-9.]*\)/\1 TFLOP\/s/; s/, "gb_per_second": \([0-9.]*\)/\1 GB\/s/' |
        awk -F'|' '{ printf "%-52s %14s  %s\n", $1, $2, $3 }'
}

mkdir -p "$build"
if wants limits && wants ours && wants peer; then
    : >"$log"
fi
touch "$log"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv,noheader 2>/dev/null

if wants limits; then
    record limits 64 "$python" bench/bench_gpu.py limits --batch 64
fi
for ((round = 0; round < rounds; round++)); do
    for batch in "${batches[@]}"; do
        ! wants ours || ours "$batch"
        ! wants peer || for form in "${forms[@]}"; do peer "$batch" "$form"; done
        # Once more, so that what has warmed up meanwhile shows.
        ! { wants ours && wants peer; } || ours "$batch"
    done
done
if wants ours; then
    record ops 64 "$program" bench ops --case vit_h14 --repeat 30 --warmup 1 --steps 1 \
        backend=cuda precision=bf16 train.batch=64 train.micro_batch=64
    ops_table
fi
echo
limits_table
table
