#!/bin/bash
# md_hpc bench: what the collectives of a step send is within 1 % of what the model's shapes predict,
# on every kind of grid; a forgotten or a doubled one would not be. And bench_gpu.sh's table of ops.
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh
keys=(image.size=32 model.patch=8 model.width=192 model.heads=4 model.layers=3 method.mask.count=6
    method.mask.min_block=4 train.batch=16 parallel.bucket_mib=0.25)

sends() { # RANKS key=value...
    "$MPIRUN" -np "$1" "$MD_HPC" bench comm --threads 1 --steps 2 --warmup 1 "${keys[@]}" "${@:2}" \
        >"$log" 2>&1 || fail "bench comm $*"
    awk '$1 ~ /^(tensor|data|all)$/ && $2 > 1 && $(NF - 1) > 0 {
            lines++
            if ($NF < 0.99 || $NF > 1.01) bad = 1
        }
        /buckets were started before/ { buckets = $3 }
        END { exit bad || !lines || buckets < 4 }' "$log" || fail "bench comm $*"
}
sends 2
sends 2 parallel.zero=1 train.micro_batch=4
sends 2 parallel.tensor=2
sends 2 parallel.tensor=2 parallel.sequence=true model.last_block=all
sends 4 parallel.tensor=2 train.micro_batch=4 train.recompute=2
sends 4 parallel.tensor=2 parallel.sequence=true parallel.zero=1
sends 2 parallel.tensor=2 parallel.sequence=true train.recompute=3
"$MPIRUN" -np 2 "$MD_HPC" bench step --threads 1 --steps 1 --warmup 0 "${keys[@]}" parallel.tensor=2 \
    >"$log" 2>&1 || fail "bench step"
says '"data": 1, "tensor": 2' '"images_per_second"'
"$MD_HPC" bench ops --threads 1 --steps 1 --warmup 0 --only colsum,adamw --repeat 3 "${keys[@]}" \
    >"$log" 2>&1 || fail "bench ops"
awk '$1 == "colsum" || $1 == "adamw" { seen[$1] = 1; next }
    $1 != "op" && $1 != "all" { bad = 1 }
    END { exit bad || !seen["colsum"] || !seen["adamw"] }' "$log" || fail "bench ops --only"
# Beside copies of 1 GB/s that take half a millisecond more, an op's share is its GB/s and half a
# millisecond over its time. Of the runs of the limits the last one counts that was not cut off.
copies() { # GB_PER_SECOND MS...
    echo '{"name": "gemm 8192 8192 8192 bf16", "ms": 1, "tflops": 5}'
    local ms name='copy of as much as some streams'
    for ms in "${@:2}"; do
        [ "$ms" != 900 ] || name='copy on the device'
        awk -v "name=$name" -v "ms=$ms" -v "rate=$1" 'BEGIN {
            printf "{\"name\": \"%s\", \"ms\": %s, \"gb_per_second\": %.6f}\n", name, ms + 0.5, rate * ms / (ms + 0.5)
        }'
    done
}
cp "$log" "$scratch/table"
printf '#!/bin/sh\ncat %q\n' "$scratch/table" >"$scratch/program"
chmod +x "$scratch/program"
for run in "3 1 2 3 900" "2 1 2 3" "1 1 2 3 900" "2 1 2 3"; do
    # shellcheck disable=SC2086 # a list
    copies $run
done >"$scratch/bench_gpu.jsonl"
BUILD=$scratch MD_HPC=$scratch/program bench/bench_gpu.sh ours >"$log" 2>&1 || fail "bench_gpu.sh ours"
awk '$1 == "colsum" || $1 == "adamw" {
        lines++
        share = $(NF - 1) + 500 / $(NF - 4)
        if ($NF < 0.97 * share || $NF > 1.03 * share) bad = 1
    }
    END { exit bad || lines < 2 }' "$log" || fail "bench_gpu.sh: shares of a copy"
rc=0
"$MD_HPC" bench ops --only colsum,none "${keys[@]}" >"$log" 2>&1 || rc=$?
[ "$rc" = 64 ] || fail "bench ops of no op: $rc"
says 'no op "none"'
rc=0
"$MD_HPC" bench step --only colsum >"$log" 2>&1 || rc=$?
[ "$rc" = 64 ] || fail "bench step --only: $rc"
echo ok
