#!/bin/bash
# The paper's claim in small, run by `make miniature`: a teacher is trained on labels, students of its
# size and of a larger one are distilled from it, and each is fine-tuned for as many epochs of labels
# as the teacher had. Two controls of each size are trained from scratch on labels: one for as many
# epochs as a student is fine-tuned (of the teacher's size it is the teacher), one for as many as a
# student has in all. Then one thing at a time is changed: no mask (plain distillation), pixels instead
# of the teacher, no target normalisation, L2, random masks: Tables 5 and 8 and Figure 2 of the paper.
# Each seed has a teacher of its own. Every run is a run directory below runs/miniature/NAME; what is
# finished is not run again. The table is printed and written beside them as table.md and table.csv,
# the plot as plot.svg.
#
# Environment: MPIRUN, MD_MINIATURE_RANKS (2), MD_MINIATURE_SEEDS ("0 1 2"), MD_MINIATURE_EPOCHS
# (factor on all lengths, 1), MD_MINIATURE_KEYS (keys for every run and evaluation, "backend=cuda"; with
# MD_MINIATURE_RANKS=1 a GPU does it all), MD_DEMO_DATA (folder with Fashion-MNIST's files),
# MD_MINIATURE_CIFAR (folder with cifar10-train.tar and cifar10-test.tar, picture files in folders of
# classes: the same on these too, cropped and mirrored, with as many steps). An argument, fashion or
# cifar10, does one of the two.
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=scripts/mpi_env.sh
. scripts/mpi_env.sh
mpirun=${MPIRUN:-mpirun} ranks=${MD_MINIATURE_RANKS:-2} factor=${MD_MINIATURE_EPOCHS:-1}
read -ra seeds <<<"${MD_MINIATURE_SEEDS:-0 1 2}"
read -ra keys <<<"${MD_MINIATURE_KEYS:-}"
start=$SECONDS

fail() {
    echo "miniature: $*" >&2
    exit 1
}

if [ $# = 0 ]; then
    "$0" fashion
    [ -z "${MD_MINIATURE_CIFAR:-}" ] || "$0" cifar10
    exit
fi

# ---- data ----

common=() lengths=1
if [ "$1" = cifar10 ]; then
    [ -n "${MD_MINIATURE_CIFAR:-}" ] || fail 'cifar10: set MD_MINIATURE_CIFAR'
    folder=runs/miniature/cifar10 store=runs/cifar10.h5
    sources=(--val "$MD_MINIATURE_CIFAR/cifar10-test.tar" "$MD_MINIATURE_CIFAR/cifar10-train.tar")
    common=(image.size=32 model.patch=8 evaluate.split=val evaluate.resize=32 "image.mean=0.4914,0.4822,0.4465"
        "image.std=0.247,0.2435,0.2616" augment.flip=0.5
        augment.crop_min=0.6 augment.ratio_min=0.75 augment.ratio_max=1.3333)
    lengths=$(tar tf "$MD_MINIATURE_CIFAR/cifar10-train.tar" | grep -c '[^/]$' | awk '{ print 60000 / $1 }')
elif [ "$1" = fashion ]; then
    folder=runs/miniature/fashion store=runs/fashion_mnist.h5
    data=${MD_DEMO_DATA:-}
    if [ -z "$data" ]; then
        data=$(dpkg -L dataset-fashion-mnist 2>/dev/null | grep 'train-images' | head -n 1) || true
        data=${data%/*}
    fi
    [ -d "$data" ] || fail 'no Fashion-MNIST: apt-get install dataset-fashion-mnist, or set MD_DEMO_DATA'
    sources=("$data")
else
    fail "fashion or cifar10, not $1"
fi
mkdir -p "$folder"
[ -f "$store" ] || "$mpirun" -np "$ranks" ./md_hpc convert --out "$store" "${sources[@]}"
common+=("data.train=$store")

# ---- runs ----

# setting FILE KEY: a number as the file has it.
setting() {
    sed -n "s/^ *$2 = \([0-9.]*\);.*/\1/p" "config/miniature/$1.cfg"
}

# stretched EPOCHS: as long as the runs are.
stretched() { awk -v a="$1" -v b="$lengths" -v c="$factor" 'BEGIN { print a * b * c }'; }

# run NAME FILE [key=value...]: one run, to its end; its log beside it. One that finished with the same
# configs and keys is left alone, one of others is made anew. $length: epochs, instead of the file's.
run() {
    local name=$1 file=$2 recipe
    shift 2
    recipe=$({ cat config/miniature/*.cfg && echo "$ranks $factor ${length:-}" "${common[@]}" "$@" "${keys[@]}"; } | cksum)
    if [ "$recipe" != "$(cat "$folder/$name.recipe" 2>/dev/null)" ]; then
        rm -rf "${folder:?}/$name" "$folder/$name.knn".*
        echo "$recipe" >"$folder/$name.recipe"
    fi
    grep -qs '"state": "finished"' "$folder/$name/status.json" && return
    printf '%5d s  %s\n' $((SECONDS - start)) "$name"
    "$mpirun" -np "$ranks" ./md_hpc "config/miniature/$file.cfg" "run.dir=$folder/$name" \
        "${common[@]}" "train.epochs=$(stretched "${length:-$(setting "$file" epochs)}")" \
        "optim.warmup_epochs=$(stretched "$(setting "$file" warmup_epochs)")" \
        "$@" "${keys[@]}" >"$folder/$name.log" 2>&1 ||
        fail "$name ended with $?; its log: $folder/$name.log"
}

# neighbours NAME: how often the nearest of 10,000 training pictures tell a test picture's class.
neighbours() {
    [ -f "$folder/$1.knn.json" ] ||
        "$mpirun" -np "$ranks" ./md_hpc evaluate "$folder/$1" "data.train=$store" evaluate.kind=knn \
            evaluate.knn_images=10000 "evaluate.output=$folder/$1.knn" "${keys[@]}" >/dev/null ||
        fail "neighbours of $1"
}

# student NAME SEED [key=value...]: distilled, then fine-tuned.
student() {
    local name=$1-$2 seed=$2
    shift 2
    run "$name" distill "run.seed=$seed" "method.teacher.weights=$teacher" "$@"
    neighbours "$name"
    local sizes=() key
    for key in "$@"; do
        [[ $key != model.* ]] || sizes+=("$key")
    done
    run "$name-tuned" finetune "run.seed=$seed" "finetune.from=$folder/$name" "${sizes[@]}"
}

# scratch NAME SEED EPOCHS [key=value...]: labels alone.
scratch() {
    local name=$1-$2 seed=$2 length=$3
    shift 3
    run "$name" teacher "run.seed=$seed" "$@"
}

large=(model.width=96)
labels=$(setting teacher epochs)
total=$(awk -v a="$(setting distill epochs)" -v b="$(setting finetune epochs)" 'BEGIN { print a + b }')
for seed in "${seeds[@]}"; do
    teacher=$folder/teacher-$seed.h5
    scratch teacher "$seed" "$labels"
    rm -f "$teacher"
    ./md_hpc weights import --out "$teacher" "$folder/teacher-$seed" >"$folder/import.log"
    student same "$seed"
    scratch same-long "$seed" "$total"
    student large "$seed" "${large[@]}"
    scratch large-short "$seed" "$labels" "${large[@]}"
    scratch large-long "$seed" "$total" "${large[@]}"
done
for seed in "${seeds[@]}"; do
    teacher=$folder/teacher-$seed.h5
    student no-mask "$seed" method.mask.kind=none method.loss.on=all
    student pixels "$seed" method.teacher.kind=pixel method.target.norm=patch_norm
    student no-norm "$seed" method.target.norm=none
    student l2 "$seed" method.loss.kind=l2
    student random-mask "$seed" method.mask.kind=random
done

# ---- the table ----

top1() { # NAME: of the last evaluation
    tail -n 1 "$folder/$1/evaluations.jsonl" | sed -n 's/.*"top1": *\([0-9.]*\).*/\1/p'
}
knn() {
    sed -n 's/.*"top1": *\([0-9.]*\).*/\1/p' "$folder/$1.knn.json" 2>/dev/null || true
}

short="$(stretched "$labels") epochs of labels" long="$(stretched "$total") epochs of labels"
rows=("teacher|the teachers: $short"
    'same|student of their size (width 48)'
    "same-long|that size, $long" 'large|larger student (width 96)'
    "large-short|that size, $short"
    "large-long|that size, $long"
    'no-mask|no mask: plain distillation' 'pixels|pixels as the teacher'
    'no-norm|no target normalisation' 'l2|L2 instead of smooth-L1' 'random-mask|random mask')
{
    echo "run,seed,top1,knn"
    for row in "${rows[@]}"; do
        for seed in "${seeds[@]}"; do
            name=${row%%|*}-$seed
            last=$name-tuned
            [ -d "$folder/$last" ] || last=$name
            echo "${row%%|*},$seed,$(top1 "$last"),$(knn "$name")"
        done
    done
} >"$folder/table.csv"

# Mean and sample standard deviation over the seeds, per row.
{
    echo "| run | fine-tuned, top-1 % | neighbours before, % |"
    echo "|---|---|---|"
    for row in "${rows[@]}"; do
        awk -F, -v run="${row%%|*}" -v text="${row#*|}" '
            function spread(s, q, n) { return n > 1 ? sqrt((q - s * s / n > 0 ? q - s * s / n : 0) / (n - 1)) : 0 }
            $1 == run { n++; s += $3; q += $3 * $3; if ($4 != "") { m++; k += $4; p += $4 * $4 } }
            END {
                printf "| %s | %.2f +- %.2f | ", text, s / n, spread(s, q, n)
                if (m) printf "%.2f +- %.2f |\n", k / m, spread(k, p, m); else print "|"
            }' "$folder/table.csv"
    done
} >"$folder/table.md"

# Bars of the means with a tick for every seed.
awk -F, -v rows="$(printf '%s;' "${rows[@]}")" '
    NR > 1 { n[$1]++; s[$1] += $3; v[$1, n[$1]] = $3; if (!low || $3 < low) low = $3; if ($3 > high) high = $3 }
    function x(value) { return 250 + 430 * (value - low) / (high - low) }
    function bar(name, text, at,    i) {
        printf "<text x=\"240\" y=\"%d\" text-anchor=\"end\">%s</text>\n", at + 13, text
        printf "<rect x=\"250\" y=\"%d\" width=\"%.1f\" height=\"16\" fill=\"#7aa6c2\"/>\n", at, x(s[name] / n[name]) - 250
        for (i = 1; i <= n[name]; i++)
            printf "<line x1=\"%.1f\" x2=\"%.1f\" y1=\"%d\" y2=\"%d\" stroke=\"black\"/>\n", x(v[name, i]), x(v[name, i]), at, at + 16
        printf "<text x=\"%d\" y=\"%d\">%.2f</text>\n", 690, at + 13, s[name] / n[name]
    }
    END {
        low = int(low) - 1; high = int(high) + 1
        count = split(rows, row, ";") - 1
        printf "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"750\" height=\"%d\" font-family=\"sans-serif\" font-size=\"13\">\n", 24 * (count + 1) + 20
        printf "<text x=\"250\" y=\"16\">top-1 of the test pictures, %d to %d %%; ticks are seeds</text>\n", low, high
        for (r = 1; r <= count; r++) { split(row[r], part, "|"); bar(part[1], part[2], 4 + 24 * r) }
        print "</svg>"
    }' "$folder/table.csv" >"$folder/plot.svg"

cat "$folder/table.md"
echo "$((SECONDS - start)) s in all; $folder/table.md, table.csv, plot.svg"
