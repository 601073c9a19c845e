#!/bin/bash
# What users get wrong and what breaks under way: one sentence that names it, the documented exit code
# on every rank, within seconds, and nothing lost.
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh
limit=$((30 * ${MD_TEST_SCALE:-1}))
# Open MPI gives ranks a second to end after the first has failed; here they have ended by then.
export OMPI_MCA_odls_base_sigkill_timeout=0

# bad CODE "WORDS" [key=value...]: the run $run (made anew unless it is `kept`) ends with this code on
# both ranks, after one line of error that holds the words, without a word from anybody else.
run=x
bad() {
    local code=$1 words=$2 r
    shift 2
    [ "$run" = kept ] || rm -rf "${scratch:?}/$run"
    rm -f "$scratch"/code.*
    wrap=(tests/every_rank.sh "$scratch/code")
    tiny 2 "$run" "$@"
    wrap=()
    [ "$rc" = "$code" ] || fail "exit code $rc instead of $code: $*"
    for r in 0 1; do
        [ "$(cat "$scratch/code.$r")" = "$code" ] || fail "rank $r: $(cat "$scratch/code.$r"): $*"
    done
    [ "$(grep -c '^md_hpc: error: ' "$log")" = 1 ] || fail "not one error: $*"
    grep '^md_hpc: error: ' "$log" | grep -qE -- "$words" || fail "the error lacks $words: $*"
    ! grep -qE 'HDF5-DIAG|MPI_|PMIX|Segmentation|mpirun' "$log" || fail "others talk: $*"
}

# ---- the config ----
bad 78 'command line: unknown key "optim.lrr"; did you mean "optim.lr"' optim.lrr=1
bad 78 'optim.lr must be a number from 0 to 100, not "fast"' optim.lr=fast
bad 78 'optim.lr must be a number from 0 to 100, not 1000' optim.lr=1000
bad 78 'train.batch: 9+ is too large' train.batch=99999999999999999999
bad 78 'method.loss.kind must be .*smooth_l1' method.loss.kind=l3
bad 78 'tiny.cfg:6, .*model.heads = 3 must divide model.width = 32' model.heads=3
bad 78 'parallel.sequence = true needs parallel.tensor of at least 2' parallel.sequence=true
bad 78 'model.drop_path_mode = "skip" does not go with parallel.sequence' parallel.tensor=2 \
    parallel.sequence=true model.drop_path_mode=skip
bad 78 'parallel.tensor = 4 does not divide the 2 ranks' parallel.tensor=4 model.heads=4
bad 78 'do not divide over parallel.tensor = 2 ranks' parallel.tensor=2 train.micro_batch=1
bad 78 'train.batch = 17 does not divide over 2 data-parallel ranks' train.batch=17
bad 78 'train.micro_batch = 3 must divide train.batch' train.micro_batch=3
bad 78 'train.micro_batch = 16 does not divide the 8 images of a data-parallel rank' train.micro_batch=16
bad 78 'train.epochs = 0.01 is less than half a step' train.epochs=0.01 optim.warmup_epochs=0
bad 78 'data.train is not set' data.train=
CUDA_VISIBLE_DEVICES=-1 bad 78 "backend 'cuda' is not in this program|no NVIDIA driver|no GPU can be used" \
    backend=cuda
sed 's/lr = 4e-3/lr = /' "$scratch/tiny.cfg" >"$scratch/syntax.cfg"
config=syntax.cfg bad 78 'syntax.cfg:[0-9]+: '
config=missing.cfg bad 66 'no config file .*missing.cfg'

# ---- the image store ----
echo text >"$scratch/text"
: >"$scratch/zero"
store=$scratch/broken.h5 size=$(stat -c %s "$scratch/tiny.h5")
bad 66 'none.h5: cannot open' data.train="$scratch/none.h5"
bad 66 'Is a directory' data.train="$scratch"
bad 65 'text: not an HDF5 file' data.train="$scratch/text"
bad 65 'zero: not an HDF5 file' data.train="$scratch/zero"
for n in 8 512 2048 $((size / 2)) $((size - 1)); do
    head -c "$n" "$scratch/tiny.h5" >"$store"
    bad 65 'broken.h5: damaged or cut' data.train="$store"
done
bad 65 "no split 'val' .*holds: train" data.split=val
bad 78 'train.batch = 128, but .*tiny.h5 has only 96 images' train.batch=128

# ---- the teacher's weights ----
teacher=method.teacher.kind=vit weights=method.teacher.weights
"$MD_HPC" weights import --out "$scratch/clip.h5" tests/golden/clip_hf >/dev/null
size=$(stat -c %s "$scratch/clip.h5")
bad 78 'needs method.teacher.weights: .*md_hpc weights import' $teacher
bad 66 'none.h5: cannot open' $teacher $weights="$scratch/none.h5"
bad 65 'text: not an HDF5 file' $teacher $weights="$scratch/text"
bad 65 'tiny.h5: not a weights file of ours' $teacher $weights="$scratch/tiny.h5"
bad 65 'method.teacher.weights: .*safetensors: not an HDF5 file' $teacher \
    $weights=tests/golden/clip_hf/model.safetensors
for n in 100 $((size / 2)) $((size - 1)); do
    head -c "$n" "$scratch/clip.h5" >"$scratch/cut.h5"
    bad 65 'cut.h5: ' $teacher $weights="$scratch/cut.h5"
done
bad 78 'grid' $teacher $weights="$scratch/clip.h5" method.teacher.image_size=32
bad 78 'method.teacher.layers = 3' $teacher $weights="$scratch/clip.h5" method.teacher.layers=3

# ---- the run directory ----
bad 66 'none.h5: there is no such checkpoint' checkpoint.resume="$scratch/none.h5"
bad 65 'text: not a checkpoint' checkpoint.resume="$scratch/text"
bad 65 'tiny.h5: not a checkpoint' checkpoint.resume="$scratch/tiny.h5"
run=kept
done_well 2 kept train.max_steps=6
before=$(ls -l "$scratch/kept/checkpoints")
bad 78 'step-00000006.h5 was trained with another model' model.width=64
store "$scratch/other.h5" 97
bad 78 'step-00000006.h5 was trained with another image store' data.train="$scratch/other.h5"
bad 65 'step-00000006.h5: ' data.train="$scratch/kept/checkpoints/step-00000006.h5"
bad 65 'step-00000006.h5: ' $teacher $weights="$scratch/kept/checkpoints/step-00000006.h5"
rm -rf "$scratch/dir" && mkdir "$scratch/dir" && echo >"$scratch/dir/file"
bad 73 'cannot make the directory .*file/run' run.dir="$scratch/dir/file/run"
[ "$before" = "$(ls -l "$scratch/kept/checkpoints")" ] || fail "the checkpoints were touched"
run=x

MD_FAULT=log.write@rank0#3:stop start 2 kept
until_true 60 asleep
run=kept first_log=$log log=$scratch/second
bad 77 "kept/LOCK: the directory is in use by process $(ranks_of "$job" | head -n 1)"
log=$first_log run=x
wake
ended 0
whole kept 20

# ---- damaged pictures in the middle of an epoch ----
# Pixels are this folder's sources: a word of theirs is a place inside some picture.
cp "$scratch/tiny.h5" "$store"
scratch_at() { # of every picture with this word, or of the first N
    grep -abo "$1" "$store" | cut -d: -f1 | awk '$1 - last >= 256 { print; last = $1 }' |
        head -n "${2:-1000}" | while read -r at; do
        printf 'xx' | dd of="$store" bs=1 seek="$at" conv=notrunc status=none
    done
}
# One: of two, the one may be what the other is replaced by, which is one more event.
scratch_at return 1
for n in 1 2 4; do
    done_well "$n" "bad_images_$n" data.train="$store"
    near bad_images_1 "bad_images_$n"
    says 'md_hpc: warning: image ' 'replaced: ' 'train-images'
    events=$(grep -c '"event":"bad_image"' "$scratch/bad_images_$n/events.jsonl")
    counted=$(curve "bad_images_$n" | tail -n 1 | cut -d' ' -f4)
    [ "$events" = "$counted" ] || fail "$events events, $counted counted"
    [ "$events" -ge 3 ] || fail "only $events bad images"
done
done_well 2 bad_images_hdf5 data.train="$store" data.reader=hdf5
same bad_images_2 bad_images_hdf5
if (near bad_images_1 kept >/dev/null); then fail "a replaced picture changes nothing"; fi
scratch_at const
bad 65 'images of epoch 0 could not be read or decoded, more than data.max_bad = 0.1 allows' \
    data.train="$store" data.max_bad=0.1
MD_FAULT=io.read@rank1 bad 65 '^md_hpc: error: rank 1: image [0-9]+ and the 63 after it'

# ---- no room for a checkpoint ----
# A limit on file sizes, set while a rank waits, stands for a full disk.
room() { # SIZE
    local p
    for p in $(ranks_of "$job"); do prlimit --pid "$p" --fsize="$1:unlimited"; done
}
MD_FAULT='log.write@rank0#8:stop,log.write@rank0#14:stop' start 2 full
until_true 60 asleep
room 100000
wake
until_true 60 asleep
[ "$(cat "$scratch/full/checkpoints/LATEST")" = step-00000005.h5 ] || fail "a half checkpoint"
room unlimited
wake
ended 0
says 'md_hpc: warning: no checkpoint at step 10, the older ones stay'
grep -q '"event":"checkpoint_failed"' "$scratch/full/events.jsonl" || fail "no event"
same kept full

MD_FAULT=log.write@rank0#8:stop start 2 full_at_end
until_true 60 asleep
room 100000
wake
ended 74
[ "$(grep -c '^md_hpc: error: ' "$log")" = 1 ] || fail "not one error"
grep -q '^md_hpc: error: .*step-00000020.h5.*File too large' "$log" || fail "the error"
find "$scratch/full_at_end/checkpoints" -name '*.partial' | grep . && fail "a partial file is left"
done_well 2 full_at_end
says 'step 5, resumed from'
same kept full_at_end

# ---- numbers that are none ----
MD_FAULT=step.nan@rank1#7 done_well 2 nan
grep -q '"step":7,.*"loss":null.*"skipped":1' "$scratch/nan/metrics.jsonl" || fail "no skip at 7"
grep -q '"step":20,.*"skipped":1' "$scratch/nan/metrics.jsonl" || fail "not one skip"
grep -q '"event":"skipped"' "$scratch/nan/events.jsonl" || fail "no event"
MD_FAULT='step.nan@rank1#7,step.nan@rank0#8,step.nan@rank1#9' \
    bad 79 'not finite 3 steps in a row, up to step 9' optim.max_skipped=3
[ "$(ls "$scratch/x/checkpoints")" = $'LATEST\nstep-00000005.h5' ] || fail "checkpoints"

# ---- a message among mpirun's own ----
rc=0
OMPI_MCA_orte_execute_quiet=0 tiny 2 x optim.lrr=1
[ "$rc" = 78 ] || fail "exit code $rc"
[ "$(grep -c 'md_hpc: error: .*optim.lrr' "$log")" = 1 ] || fail "not one error"
# A rank with another config would exchange other numbers of bytes.
cat >"$scratch/other.sh" <<'END_OF_SCRIPT'
[ "${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}}" = 0 ] || set -- "$@" parallel.bucket_mib=2
exec "$@"
END_OF_SCRIPT
wrap=(bash "$scratch/other.sh")
tiny 2 other
[ "$rc" = 78 ] || fail "exit code $rc of ranks with different configs"
says 'the configuration (a hash of its values) differs between ranks'
echo ok
