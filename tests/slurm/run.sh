#!/bin/bash
# jobscripts/slurm/train.sbatch under a real Slurm: a throw-away cluster of two nodes on this machine
# (munged, slurmctld and two slurmd with files and ports of their own), and three jobs in it:
#
#   srun      2 ranks on one node: USR1 before the time limit, checkpoint, requeue, finish; the curve
#             must be that of an undisturbed run, bit for bit
#   mpirun    2 ranks on two nodes: the same
#   cancelled scancel while it runs: a checkpoint, and the job must not come back
#
# Takes about six minutes, most of them Slurm's delay before a requeued job starts. Needs
# slurm-wlm and munge installed, and root; exits with 77 otherwise. No part of `make test`.
#
#   tests/slurm/run.sh [FOLDER]    FOLDER keeps logs and runs; without it they are removed
set -eu
cd "$(dirname "$0")/../.."
for tool in slurmctld slurmd munged sbatch; do
    PATH=$PATH:/usr/sbin command -v "$tool" >/dev/null || { echo "$tool is not installed" && exit 77; }
done
[ "$(id -u)" = 0 ] || { echo 'it is run as root' && exit 77; }
MD_HPC=$(realpath "${BUILD:-build}/md_hpc") MPIRUN=${MPIRUN:-mpirun}
export MD_HPC PATH=$PATH:/usr/sbin
. tests/tiny_run.sh
cluster=$(realpath -m "${1:-$scratch}/cluster")
rm -rf "$cluster"
mkdir -p "$cluster/state"

# ---- the cluster ----

stop_cluster() {
    local file
    scancel --user="$(id -un)" 2>/dev/null || true
    sleep 2
    for file in "$cluster"/slurmd.n?.pid "$cluster/slurmctld.pid" "$cluster/munged.pid"; do
        [ ! -s "$file" ] || kill "$(cat "$file")" || true
    done
    [ -z "${1:-}" ] || cp -r "$scratch/." "$1/"
    rm -rf "$scratch"
}
trap 'stop_cluster "${keep:-}"' EXIT
keep=${1:+$(realpath "$1")}

start_cluster() {
    local host port
    host=$(hostname -s) port=$((20000 + $$ % 20000))
    head -c 128 /dev/urandom >"$cluster/munge.key"
    chmod 600 "$cluster/munge.key"
    munged --force --key-file="$cluster/munge.key" --socket="$cluster/munge.sock" \
        --pid-file="$cluster/munged.pid" --log-file="$cluster/munged.log" \
        --seed-file="$cluster/munged.seed" 2>/dev/null
    cat >"$cluster/slurm.conf" <<END
ClusterName=throwaway
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$cluster/munge.sock
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool.%n
SlurmdPidFile=$cluster/slurmd.%n.pid
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdLogFile=$cluster/slurmd.%n.log
SlurmctldLogFile=$cluster/slurmctld.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MailProg=/bin/true
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2
PartitionName=gpu Nodes=n1,n2 Default=YES MaxTime=60 OverSubscribe=NO State=UP
END
    export SLURM_CONF=$cluster/slurm.conf
    slurmctld -c -i
    slurmd -N n1
    slurmd -N n2
    until_true 30 nodes_idle 2
}
nodes_idle() {
    [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = "$1" ]
}

# ---- jobs ----

# job NAME SITE_LINE RANKS_PER_NODE sbatch options...: submits an edited copy, as a user would; prints
# its number. Its run ends 300 steps after the first requeue and would never end without one, however
# fast the machine is: the site file is read by each start of the job. Output: $scratch/NAME.out.
job() {
    local name=$1 line=$2 ranks=$3
    shift 3
    cat >"$scratch/$name.env" <<END
$line
steps=100000000
[ "\$restarts" = 0 ] || steps=\$((\$(sed -n 's/^ *"step": \([0-9]*\),/\1/p' "$scratch/$name/status.json") + 300))
OVERRIDES+=("train.max_steps=\$steps")
END
    awk -v data="data.train=$scratch/tiny.h5" -v run="run.dir=$scratch/$name" '
        /^OVERRIDES=\(/ {
            print "OVERRIDES=(" data, run, "train.epochs=1e6 checkpoint.every=100000 log.every=1000)"
            inside = 1
        }
        inside { if (/^\)/) inside = 0; next }
        { print }' jobscripts/slurm/train.sbatch |
        sed -e "s|^MD_HPC=.*|MD_HPC=$cluster/md_hpc|" -e "s|^CONFIG=.*|CONFIG=$scratch/tiny.cfg|" \
            -e "s|^SITE=.*|SITE=$scratch/$name.env|" >"$scratch/$name.sbatch"
    sbatch --parsable --output="$scratch/$name.out" --job-name="$name" --ntasks-per-node="$ranks" \
        --cpus-per-task=1 --gpus-per-node=0 "$@" "$scratch/$name.sbatch"
}

# field JOB NAME: of scontrol show job, which knows a job for some minutes after its end.
field() {
    scontrol -o show job "$1" | tr ' ' '\n' | sed -n "s/^$2=//p"
}
over() {
    case $(field "$1" JobState) in
    COMPLETED | FAILED | CANCELLED | TIMEOUT | NODE_FAIL) ;;
    *) return 1 ;;
    esac
}
report() { # NAME JOB
    echo "--- $1: job $2 is $(field "$2" JobState), exit code $(field "$2" ExitCode)," \
        "restarts $(field "$2" Restarts)"
    cat "$scratch/$1.out"
}

# finished NAME JOB: after one requeue, on the curve of an undisturbed run.
finished() {
    local steps
    until_true 600 over "$2"
    report "$1" "$2"
    [ "$(field "$2" JobState)" = COMPLETED ] || fail "$1 has not completed"
    [ "$(field "$2" Restarts)" = 1 ] || fail "$1 was not queued again once"
    grep -q 'resumed from' "$scratch/$1.out" || fail "$1 has not resumed"
    steps=$(curve "$1" | tail -n 1 | cut -d' ' -f1)
    whole "$1" "$steps"
    done_well 2 "$1.straight" train.epochs=1e6 train.max_steps="$steps" checkpoint.every=100000 \
        log.every=1000
    rm "$log" # it went well
    same "$1" "$1.straight"
    echo "$1: $steps steps, the same bits as an undisturbed run"
}

# The program and its job scripts as they would be installed.
ln -s "$MD_HPC" "$cluster/md_hpc"
cp -r jobscripts "$cluster/"
start_cluster
limit=600
one=$(job srun 'SRUN_ARGS=(--mpi=pmix)' 2 --nodes=1 --time=2 --signal=B:USR1@60)
cancelled=$(job cancelled 'SRUN_ARGS=(--mpi=pmix)' 1 --nodes=1 --time=30)
until_true 60 at_step cancelled 100
scancel "$cancelled"
until_true 120 over "$cancelled"
report cancelled "$cancelled"
[ "$(field "$cancelled" JobState)" = CANCELLED ] || fail "the cancelled job came back"
grep -q '"state": "requeue"' "$scratch/cancelled/status.json" || fail "the cancelled job left no checkpoint"
# Ranks of two nodes share no memory.
two=$(job mpirun 'LAUNCHER=openmpi && export OMPI_MCA_btl=self,tcp OMPI_MCA_btl_tcp_if_include=lo' 1 \
    --nodes=2 --time=2 --signal=B:USR1@60)
finished srun "$one"
finished mpirun "$two"
echo ok
