#!/bin/bash
# Labels on the cuda backend, on the stand-in for CUDA (tests/emu): a classifier trained and evaluated
# as on the cpu backend, alone and on a grid of ranks; nearest neighbours and probes of its features.
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh
host=$MD_HPC
emu=$(dirname "$MD_HPC")/emu/md_hpc
[ -x "$emu" ] || { echo "no $emu" && exit 77; }
limit=$((120 * ${MD_TEST_SCALE:-1}))
keys=(task=finetune model.classes=10 model.rel_pos=per_layer augment.jitter=0 augment.mixup=0.8
    augment.cutmix=1 augment.erasing=0.5 optim.layer_decay=0.7 optim.ema=0.9 optim.lr=8e-3
    train.max_steps=4 evaluate.every=10 evaluate.split=train evaluate.batch=16)

counts() {
    sed -n 's/.*"images":\([0-9]*\),"top1_hits":\([0-9]*\),"top5_hits":\([0-9]*\).*/\1 \2 \3/p' \
        "$scratch/$1/evaluations.jsonl"
}
hits() {
    sed -n 's/.*"\(images\|top._hits\)": \([0-9]*\).*/\2/p' "$1" | tr '\n' ' '
}

done_well 1 cpu "${keys[@]}"
done_well 1 cpu-average "${keys[@]}" evaluate.ema=true
[ "$(counts cpu | cut -d' ' -f1)" = 96 ] || fail "evaluations: $(counts cpu)"
MD_HPC=$emu
keys+=(backend=cuda)
done_well 1 fp32 "${keys[@]}" precision=fp32
done_well 4 grid "${keys[@]}" precision=fp32 parallel.tensor=2 parallel.sequence=true parallel.zero=1 \
    parallel.comm=mpi train.recompute=2
for run in fp32 grid; do
    near cpu "$run"
    [ "$(counts cpu)" = "$(counts "$run")" ] || fail "cpu: $(counts cpu), $run: $(counts "$run")"
done
done_well 2 average "${keys[@]}" precision=fp32 parallel.zero=1 parallel.comm=mpi evaluate.ema=true
near cpu average
[ "$(counts cpu-average)" = "$(counts average)" ] ||
    fail "moving average: $(counts cpu-average), on cuda $(counts average)"
# Another look at the averages, in the middle, leaves no trace: with recorded steps and their rounded
# copies of the values, and where these have to be gathered again.
looks() { # RANKS RUN [key=value...]
    done_well "$1" "$2" "${keys[@]}" train.max_steps=8 evaluate.every=1 "${@:3}"
    done_well "$1" "$2-average" "${keys[@]}" train.max_steps=8 evaluate.every=1 evaluate.ema=true "${@:3}"
    same "$2" "$2-average"
    diff <(state "$2") <(state "$2-average") || fail "$2: another state"
}
state() {
    "$host" checkpoint info "$scratch/$1/checkpoints/step-00000008.h5" | grep 'state hash'
}
looks 1 alone model.drop_path_mode=mask
looks 2 zero parallel.zero=1 parallel.comm=mpi
done_well 2 bf16 "${keys[@]}" parallel.zero=1 parallel.comm=mpi
paste <(curve cpu) <(curve bf16) | awk '
    { d = $2 > $6 ? $2 - $6 : $6 - $2 }
    /null/ || d > 0.02 * $2 { print; bad = 1 }
    END { exit bad || NR == 0 }' || fail "bf16 is not close"

neighbours=(evaluate.kind=knn evaluate.knn_k=3 evaluate.split=train)
"$host" evaluate "$scratch/cpu" "${neighbours[@]}" "evaluate.output=$scratch/a" >"$log" 2>&1 ||
    fail "neighbours on the cpu"
"$MPIRUN" -np 2 "$emu" evaluate "$scratch/cpu" "${neighbours[@]}" "evaluate.output=$scratch/b" \
    backend=cuda precision=fp32 parallel.comm=mpi >"$log" 2>&1 || fail "neighbours on cuda"
[ "$(hits "$scratch/a.json")" = "$(hits "$scratch/b.json")" ] ||
    fail "neighbours: $(hits "$scratch/a.json"), on cuda $(hits "$scratch/b.json")"

losses() {
    sed -n 's/.*"train_loss": \([^,]*\).*/\1/p' "$1"
}
# LARS moves a weight by a thousandth of the rate, so MAE's is high enough to show whether it does.
for recipe in beit mae; do
    probe=(evaluate.kind=probe "evaluate.probe_recipe=$recipe" evaluate.probe_epochs=3 evaluate.probe_batch=16
        "evaluate.probe_lr=$([ $recipe = mae ] && echo 4 || echo 0.01)" evaluate.split=train evaluate.batch=8)
    "$host" evaluate "$scratch/cpu" "${probe[@]}" "evaluate.output=$scratch/a" >"$log" 2>&1 ||
        fail "probe $recipe on the cpu"
    cuda=("$MPIRUN" -np 2 "$emu" evaluate "$scratch/cpu" "${probe[@]}" backend=cuda precision=fp32
        parallel.comm=mpi)
    "${cuda[@]}" "evaluate.output=$scratch/b" >"$log" 2>&1 || fail "probe $recipe on cuda"
    [ "$(hits "$scratch/a.json")" = "$(hits "$scratch/b.json")" ] ||
        fail "probe $recipe: $(hits "$scratch/a.json"), on cuda $(hits "$scratch/b.json")"
    "$emu" evaluate "$scratch/cpu" "${probe[@]}" "evaluate.output=$scratch/c" backend=cuda \
        precision=bf16 >"$log" 2>&1 || fail "probe $recipe in bf16"
    paste <(losses "$scratch/a.json") <(losses "$scratch/b.json") <(losses "$scratch/c.json") | awk '
        function off(x, y) { return x > y ? x - y : y - x }
        off($1, $2) > 1e-5 * $1 || off($1, $3) > 0.02 * $1 { print; bad = 1 }
        END { exit bad || NR == 0 }' || fail "training losses of probe $recipe: cpu, fp32, bf16"
done
# Killed, and on to the same losses and hits.
cuda+=("evaluate.output=$scratch/d")
rc=0
MD_FAULT=comm.alltoallv@rank1#10:kill "${cuda[@]}" >"$log" 2>&1 || rc=$?
[ "$rc" = 137 ] || fail "a probe killed on cuda: exit code $rc"
"${cuda[@]}" >"$log" 2>&1 || fail "a probe goes on on cuda"
says "probe: goes on from $scratch/d.probe/step-00000006.h5"
diff <(losses "$scratch/b.json") <(losses "$scratch/d.json") || fail "a probe went on elsewhere"
[ "$(hits "$scratch/b.json")" = "$(hits "$scratch/d.json")" ] || fail "a probe went on to other hits"
