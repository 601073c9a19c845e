#!/bin/bash
# A rank is killed, and stopped, at every fault site that training passes, on rank 0 and on a rank
# that is not 0: the run ends by itself with the documented code (137 and 76) and names the rank, no
# process is left, and the same command goes on to the curve that nobody disturbed. And slow places,
# which hang nobody or are named.
#
# The sites come from the sources: one that is in no list below, or not in docs/FAILURES.md, fails.
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh
export OMPI_MCA_odls_base_sigkill_timeout=0
limit=$((60 * ${MD_TEST_SCALE:-1}))
hang=1 jobs=12 # most jobs wait most of the time
[ "${MD_TEST_SCALE:-1}" = 1 ] || hang=4 jobs=6
sed -i 's/max_steps = 20/max_steps = 24/; s/every = 5/every = 3/; s/"pixel"/"vit"/' "$scratch/tiny.cfg"
"$MD_HPC" weights import --out "$scratch/clip.h5" tests/golden/clip_hf >"$log"
keys=(method.teacher.weights="$scratch/clip.h5")

# site#pass: ranks that pass it, and what kind of run: tp and sp share a model, the latter with
# sequence, ZeRO and drift checks; again goes on from a checkpoint. Places of the step first; then
# those of checkpoints and of setting up, where patience is ten times longer. Passes are such that a
# run that begins later reaches them too.
sweep='
step.forward#4 0 1            step.backward#4 0 1           step.update#4 0 1
step.nan#4 0 1                io.read#40 0 1                io.read.transient#40 0 1
loader.decode#40 0 1          comm.allreduce_begin#8 0 1    comm.wait#8 0 1
comm.allreduce#70 0 1         log.write#4 0
tp_enter.bwd#9 0 1 tp         tp_exit.fwd#9 0 1 tp          all_rows.fwd#4 0 1 tp
sp_gather.fwd#9 0 1 sp        sp_gather.bwd#9 0 1 sp        sp_scatter.fwd#9 0 1 sp
sp_scatter.bwd#9 0 1 sp       comm.allgather#40 0 1 sp      comm.reduce_scatter#40 0 1 sp
comm.allgather_begin#3 0 1 sp comm.reduce_scatter_begin#3 0 1 sp
check.drift#1 0 1 sp
ckpt.write#2 0 1              ckpt.fsync#2 0 1              ckpt.verify#2 0 1
ckpt.flip#20 0 1              comm.barrier#2 0 1            ckpt.create#2 0
ckpt.space#2 0                ckpt.seal#2 0                 ckpt.rename#2 0
ckpt.latest#2 0               ckpt.prune#2 0                ckpt.list#3 0
ckpt.gather#1 0 1 tp          ckpt.open#1 0 again           ckpt.hash#1 0 1 again
ckpt.read#1 0 1 again
base.alloc#45 0 1             watchdog.thread#1 0 1         dataset.open#1 0 1
dataset.index#2 0             h5.open#3 0                   run_dir.lock#1 0
weights.load#3 0              loader.thread#1 0 1           comm.allreduce#20 0 1
comm.allgather#1 0 1          comm.bcast#3 0 1              log.open#1 0
comm.split#2 0 1              comm.shared#1 0 1
publish.sync#1 0              log.replace#1 0'
# Sites that training does not pass.
elsewhere='convert.read convert.write convert.publish weights.read weights.write comm.exscan
comm.alltoallv ckpt.abandon cuda.alloc cuda.sync probe.fetch'

# ---- no site is forgotten ----
mapfile -t sites < <(grep -rhoE '(md_fault\(|comm_enter\(c, |pass_site\(c, |(sum|gather|scatter)\(g, )"[a-z0-9_.]+"' src io mpi kernels |
    grep -oE '[a-z0-9_.]+"$' | tr -d '"' | sort -u)
[ ${#sites[@]} -gt 30 ] || fail "only ${#sites[@]} fault sites in the sources"
known=$(tr ' ' '\n' <<<"$sweep $elsewhere" | sed 's/#.*//' | grep '[.]' | sort -u)
diff <(printf '%s\n' "${sites[@]}") <(echo "$known") >"$log" || fail "sites of the sources and here:"
for site in "${sites[@]}"; do
    grep -qF "\`$site\`" docs/FAILURES.md || fail "docs/FAILURES.md lacks the fault site $site"
done
for site in $elsewhere; do
    grep -rqF "$site" --include=*.c --include=*.sh --exclude=fault_sweep.sh tests || fail "no test of $site"
done

# ---- the jobs ----

# gone RUN: no rank of it lives.
gone() {
    ! grep -lsa "run.dir=$scratch/$1" /proc/[0-9]*/cmdline >"$scratch/$1.left"
}

# struck CODE RUN FAULT: ends with this code and leaves nobody.
struck() {
    MD_FAULT=$3 tiny 2 "$2" "${keys[@]}" "${grid[@]}" hang.seconds=$hang
    [ "$rc" = "$1" ] || fail "$3: exit code $rc instead of $1"
    until_true 10 gone "$2"
}

# verdict RUN RANK WORDS: it is on stderr and in the run directory. Before the run directory is
# known, the others can only say that they wait.
verdict() {
    local text
    if [ -e "$scratch/$1/hang" ]; then
        text=$(cat "$scratch/$1/hang/verdict.txt") || fail "no verdict"
        [[ $text == "rank $2 "*"$3"* ]] || fail "the verdict is: $text"
        [ "$(grep -cF "md_hpc: error: $text" "$log")" = 1 ] || fail "not told once: $text"
        grep -q '"exit_code": 76' "$scratch/$1/status.json" || fail "no exit code in status.json"
        grep -q '^phase ' "$scratch/$1"/hang/rank-0000*.txt || fail "no record"
        grep -q 'md_hpc(main' "$scratch/$1"/hang/rank-0000*.txt || fail "no stack"
    else
        grep -qE "md_hpc: error: rank $((1 - $2)) .* waits in comm\." "$log" || fail "nobody waits"
    fi
}

grid=() # keys of a kind of run
declare -A grids=([tp]='parallel.tensor=2'
    [sp]='parallel.tensor=2 parallel.sequence=true parallel.zero=1 check.every=3')

# site NUMBER SITE RANKS... [KIND]: each run goes on where the one before was struck.
site() {
    local run=site$1 at=$2 base=base r ranks=()
    shift 2
    log=$scratch/$run.log
    for r in "$@"; do
        case $r in
        [01]) ranks+=("$r") ;;
        again) done_well 2 "$run" "${keys[@]}" train.max_steps=6 ;;
        *) read -ra grid <<<"${grids[$r]}" && base=base_$r ;;
        esac
    done
    for r in "${ranks[@]}"; do
        case $at in
        comm.* | check.drift*) struck 69 "$run" "${at/\#/@rank$r#}" ;;
        ckpt.open* | ckpt.hash* | ckpt.read*) struck 74 "$run" "${at/\#/@rank$r#}" ;;
        esac
        struck 137 "$run" "${at/\#/@rank$r#}:kill"
        struck 76 "$run" "${at/\#/@rank$r#}:stop"
        verdict "$run" "$r" "does not answer"
    done
    done_well 2 "$run" "${keys[@]}" "${grid[@]}"
    same "$base" "$run"
    [ ! -e "$scratch/$run/hang" ] || fail "$at: the next run leaves the old one's records"
    rm -r "${scratch:?}/$run"
}

# All ranks answer, but one waits for its disk.
slow_disk() {
    log=$scratch/slow.log
    struck 76 slow io.read@rank1#9:slow=600000
    verdict slow 1 "stopped in data.wait at step "
    grep -q "; 1 rank waits in comm\." "$scratch/slow/hang/verdict.txt" || fail "rank 0 is not named"
    grep -q 'md_loader_take' "$scratch/slow/hang/rank-00001.txt" || fail "no stack of rank 1"
    done_well 2 slow "${keys[@]}"
    same base slow
}

# A rank that takes long but moves hangs nobody. Its 16 reads last about three times as long as the
# others need to lose patience and to hear everybody.
slow_rank() {
    log=$scratch/crawl.log
    local run=(2 crawl "${keys[@]}" hang.seconds="$hang" data.sync=true data.reader=hdf5 train.batch=32)
    done_well "${run[@]}" train.max_steps=3
    MD_FAULT=io.read@rank1:slow=$((600 * hang)) tiny "${run[@]}" train.max_steps=4
    [ "$rc" = 0 ] || fail "a slow rank ends the run with $rc"
    says "warning: rank 1 " " is slow: in data.wait at step 4; 1 rank waits in comm."
    [ ! -e "$scratch/crawl/hang/verdict.txt" ] || fail "a verdict on a slow rank"
}

# A rank that is stopped and goes on before the verdict is let go, and so are those that waited.
continued() {
    log=$scratch/nap.log
    MD_FAULT=step.forward@rank1#4:stop start 2 nap "${keys[@]}" hang.seconds=$((2 * hang))
    until_true 60 test -e "$scratch/nap/hang/CALL"
    asleep || fail "nobody was stopped"
    wake
    ended 0
    ! ls "$scratch"/nap/hang/* 2>/dev/null || fail "records are left"
    same base nap
}

done_well 2 base "${keys[@]}"
for kind in "${!grids[@]}"; do
    read -ra grid <<<"${grids[$kind]}"
    done_well 2 "base_$kind" "${keys[@]}" "${grid[@]}"
done
grid=()
failed=0
# job COMMAND...: beside up to $jobs others.
job() {
    local running
    mapfile -t running < <(jobs -rp)
    [ ${#running[@]} -lt $jobs ] || wait -n || failed=1
    "$@" &
}
number=0
# Those that wait longest first.
while read -r -a row; do
    number=$((number + 1))
    job site $number "${row[@]}"
done < <(grep -oE '[a-z0-9_.]+#[0-9]+( [01])+( (tp|sp|again))?' <<<"$sweep" | tac)
job slow_disk
job slow_rank
job continued
while [ -n "$(jobs -rp)" ]; do wait -n || failed=1; done
[ $failed = 0 ]
echo "$number sites"
