#!/bin/bash
# md_hpc convert as users call it: the same file from 1, 2 and 3 ranks; a kill or a fault at any place
# leaves nothing that looks whole; every failure has its exit code, on every number of ranks.
set -eu
cd "$(dirname "$0")/../.."
. tests/env.sh
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
data=${MD_TEST_DATA:-../shared/data}
fashion=/usr/share/datasets/fashion-mnist

fail() {
    echo "convert: $*"
    cat "$scratch/log"
    exit 1
}

# expect CODE RANKS ARGUMENTS...: convert ends with this exit code within a minute.
expect() {
    local want=$1 n=$2 rc=0
    shift 2
    timeout 60 "$MPIRUN" -np "$n" "$MD_HPC" convert "$@" >"$scratch/log" 2>&1 </dev/null || rc=$?
    [ "$rc" = "$want" ] || fail "exit code $rc instead of $want on $n ranks: $*"
}

# word N: the 32 bits of a big-endian number.
word() {
    local hex
    printf -v hex '%08x' "$1"
    printf '%b' "\\x${hex:0:2}\\x${hex:2:2}\\x${hex:4:2}\\x${hex:6:2}"
}

# idx NAME COUNT: images of 16 x 16 bytes of this folder's files, and labels 0 .. 9.
idx() {
    mkdir -p "$(dirname "$1")"
    {
        printf '\0\0\10\3'
        word "$2"
        word 16
        word 16
        cat io/*.c | head -c $((256 * $2))
    } >"$1-images-idx3-ubyte"
    {
        printf '\0\0\10\1'
        word "$2"
        for ((i = 0; i < $2; i++)); do printf '%b' "\\x0$((i % 10))"; done
    } >"$1-labels-idx1-ubyte"
}

# One file from any number of ranks.
same() { # NAME SOURCE...
    local name=$scratch/$1
    shift
    expect 0 1 --out "$name.1" --seed 5 "$@"
    for n in 2 3; do
        expect 0 "$n" --out "$name.$n" --seed 5 "$@"
        cmp "$name.1" "$name.$n" || fail "$n ranks write another file"
    done
    expect 0 2 --verify "$name.3"
    rm "$name".[123]
}

only_partial() {
    [ ! -e "$scratch/x.h5" ] || fail "x.h5 is there: $*"
}
nothing_left() {
    only_partial "$@"
    [ ! -e "$scratch/x.h5.partial" ] || fail "x.h5.partial is there: $*"
}

source=$scratch/src/train
idx "$source" 300
idx "$scratch/src/t10k" 40
same idx "$scratch/src"
[ ! -d "$data/imagenet-samples" ] || same folder "$data/imagenet-samples"
[ ! -f "$data/cifar10-test.tar" ] || same tar --val "$data/cifar10-test.tar"
[ ! -d "$fashion" ] || same gzip "$fashion/t10k-images-idx3-ubyte.gz"

# Exit codes.
out=$scratch/x.h5
expect 64 1 "$scratch/src"
expect 64 2 --out "$out"
expect 64 1 --out "$out" --oder source "$scratch/src"
expect 66 2 --out "$out" "$scratch/none"
echo text >"$scratch/text"
expect 65 2 --out "$out" "$scratch/text"
mkdir -p "$scratch/bad/class"
echo text >"$scratch/bad/class/1.jpg"
expect 65 2 --out "$out" "$scratch/bad"
grep -q "class/1.jpg" "$scratch/log" || fail "the reject is not named"
expect 73 2 --out "$scratch/none/x.h5" "$scratch/src"
nothing_left
expect 0 2 --out "$out" "$scratch/src"
cp "$out" "$scratch/good.h5"
expect 73 2 --out "$out" "$scratch/src"
expect 0 2 --out "$out" --force "$scratch/src"
cmp "$out" "$scratch/good.h5"
expect 65 2 --verify "$scratch/text"
# The pictures are this folder's sources: a word of theirs is a place inside one.
at=$(grep -abo -m 1 md_status "$out" | head -n 1 | cut -d: -f1)
printf 'xx' | dd of="$out" bs=1 seek="$at" conv=notrunc status=none
expect 65 3 --verify "$out"
rm "$out"

# A fault on any rank is everybody's exit code, and nothing is left.
for site in convert.read convert.write convert.publish io.read; do
    for rank in 0 1; do
        [ "$site$rank" != convert.publish1 ] || continue
        MD_FAULT=$site@rank$rank#1 expect 74 2 --out "$out" "$scratch/src"
        nothing_left "$site on rank $rank"
    done
done

# No memory at any place of any rank: an exit code, never a hang.
for rank in 0 1; do
    for pass in 3 13 23 33 43 53; do
        rc=0
        MD_FAULT=base.alloc@rank$rank#$pass timeout 60 "$MPIRUN" -np 2 "$MD_HPC" convert \
            --out "$out" --force "$scratch/src" >"$scratch/log" 2>&1 || rc=$?
        case $rc in
        0 | 71 | 73) ;;
        *) fail "exit code $rc without memory at $pass on rank $rank" ;;
        esac
    done
done
rm -f "$out" "$out.partial"

# A killed run leaves no file with the final name; the next one starts over.
for site in convert.read#20 convert.write#20 io.read#20 convert.publish; do
    MD_FAULT=$site@rank0:kill expect 137 2 --out "$out" "$scratch/src"
    only_partial "killed at $site"
done
expect 0 2 --out "$out" "$scratch/src"
cmp "$out" "$scratch/good.h5"
[ ! -e "$out.partial" ] || fail "a partial file is left"

echo ok
