# What the Slurm and the PBS script share. Sourced by them, never run by itself.
#
# A script sets, before it calls `job_main`:
#   MD_HPC CONFIG OVERRIDES SITE MIN_STEPS MAX_RESTARTS   what its user edits; see the scripts
#   LAUNCHER         srun, openmpi (mpirun) or hydra (mpiexec of MPICH and Intel MPI)
#   job_id restarts  the job's number, and how many jobs of this run came before it
#   nodes ranks ranks_per_node cpus_per_rank
#   hosts            file with host names for mpirun; empty where it asks the scheduler
#   stop_after       seconds until this script itself has to stop the run; empty where the
#                    scheduler sends the signal
#   job_again        function: hands the run to the next job, or fails after saying why
# A site file (jobscripts/site) may set
#   LAUNCHER SRUN_ARGS MPIRUN_ARGS   another launcher, and more options for it
#   LAUNCH           array: a whole launch command, instead of all of the above
#   THREADS          OpenMP threads of a rank, instead of cpus_per_rank
#   RETRY_PAUSE      seconds between attempts to reach the scheduler
#
# How a job ends is read from the run directory's status.json, which rank 0 writes, and not from the
# launcher: srun -K1 returns 143 when it had to kill ranks, whatever the reason was.
# Exit codes are those of the program (`md_hpc help exit-codes`); 0 also when the next job has taken
# over, 75 when there is a checkpoint and nobody was asked to go on.
# shellcheck shell=bash
: "${job_id:?} ${restarts:?} ${nodes:?} ${ranks:?} ${ranks_per_node:?} ${cpus_per_rank:?}"
: "${LAUNCHER:?}"
SRUN_ARGS=() MPIRUN_ARGS=() LAUNCH=() THREADS=''
export RETRY_PAUSE=20
launcher='' timer='' stop_by='' signals=0

say() {
    echo "$(date '+%Y-%m-%d %H:%M:%S') job $job_id: $*"
}

# die CODE WORDS...
die() {
    local code=$1
    shift
    say "error: $*" >&2
    exit "$code"
}

# ---- what the program knows ----

# config_value KEY: a text of the resolved config where it differs from the default, else nothing.
config_value() {
    sed -n "s/^${1//./\\.}=\"\(.*\)\" *# .*, default .*/\1/p" <<<"$config_diff" |
        sed 's/\\\(["\\]\)/\1/g'
}

# status_value KEY: of status.json, where every key has a line of its own.
status_value() {
    sed -n -e "s/^ *\"$1\": \"\(.*\)\",\{0,1\}\$/\1/p" -e "s/^ *\"$1\": \([0-9]*\),\{0,1\}\$/\1/p" \
        "$run_dir/status.json" 2>/dev/null | sed 's/\\n/ /g; s/\\\(["\\]\)/\1/g'
}

# ---- checks, so that a mistake costs seconds of the allocation ----

check_program() {
    "$MD_HPC" version >/dev/null || die 69 "$MD_HPC does not run on $(hostname): are the modules" \
        "it was built with loaded by $site_file?"
    "$MD_HPC" config check "$CONFIG" "${OVERRIDES[@]}" ||
        die $? "the config $CONFIG or an override has errors, see above"
    config_diff=$("$MD_HPC" config show "$CONFIG" "${OVERRIDES[@]}" --diff)
}

check_paths() {
    local data name
    data=$(config_value data.train)
    [ -n "$data" ] || die 78 'data.train is not set: add data.train=FILE.h5 to OVERRIDES'
    [ -r "$data" ] || die 66 "data.train: $data cannot be read on $(hostname) (from $PWD)"
    run_dir=$(config_value run.dir) name=$(basename "$CONFIG" .cfg)
    run_dir=${run_dir:-runs/$name}
    mkdir -p "$run_dir"
    [ -w "$run_dir" ] || die 73 "run directory $run_dir cannot be written"
    # One restart may come of a node that failed before the run had begun.
    [ "$restarts" -lt 2 ] || [ -e "$run_dir/status.json" ] ||
        die 78 "$restarts jobs came before this one, but $run_dir is new: run.dir must be the same" \
            "for all of them, without a date or a job number in it"
}

check_gpus() {
    local n
    [ "$(config_value backend)" = cuda ] || return 0
    n=$(nvidia-smi -L | grep -c '^GPU ')
    [ "$n" -ge "$ranks_per_node" ] || die 69 "$(hostname) shows $n GPUs for $ranks_per_node ranks;" \
        "one rank a GPU is needed: were GPUs asked of the scheduler?"
}

# ---- launch ----

# Ranks are bound to cores, node after node, and every rank sees all GPUs of its node: the program
# takes the one of its node-local rank, and NCCL keeps peer access. OpenMP threads are left unbound
# inside the rank's cores (no OMP_PROC_BIND), since loader threads would inherit one core.
launch_line() {
    [ $((ranks_per_node * nodes)) = "$ranks" ] ||
        die 64 "$ranks ranks cannot be shared evenly by $nodes nodes"
    export OMP_NUM_THREADS=${THREADS:-$cpus_per_rank}
    [ ${#LAUNCH[@]} = 0 ] || return 0
    case $LAUNCHER in
    srun) # since 22.05 it takes no --cpus-per-task over from sbatch
        LAUNCH=(srun -K1 --nodes="$nodes" --ntasks="$ranks" --ntasks-per-node="$ranks_per_node"
            --cpus-per-task="$cpus_per_rank" --cpu-bind=cores)
        [ -z "${SLURM_GPUS_ON_NODE:-}" ] || LAUNCH+=(--gpu-bind=none)
        LAUNCH+=("${SRUN_ARGS[@]}")
        ;;
    openmpi) # remote ranks get only the variables named here
        LAUNCH=(mpirun -np "$ranks" --map-by "ppr:$ranks_per_node:node:PE=$cpus_per_rank"
            --bind-to core -x OMP_NUM_THREADS)
        [ -z "${LD_LIBRARY_PATH:-}" ] || LAUNCH+=(-x LD_LIBRARY_PATH)
        [ -z "$hosts" ] || LAUNCH+=(--hostfile "$hosts")
        LAUNCH+=("${MPIRUN_ARGS[@]}")
        ;;
    hydra)
        LAUNCH=(mpiexec -n "$ranks" -ppn "$ranks_per_node" -bind-to "core:$cpus_per_rank")
        [ -z "$hosts" ] || LAUNCH+=(-f "$hosts")
        LAUNCH+=("${MPIRUN_ARGS[@]}")
        ;;
    *) die 64 "LAUNCHER=$LAUNCHER is none of srun, openmpi, hydra" ;;
    esac
}

# Every signal becomes USR1: srun and mpirun pass it on to the ranks, which write a checkpoint. A TERM
# would make mpirun kill them.
on_signal() {
    stop_by=${stop_by:-$1}
    [ -z "$launcher" ] || kill -USR1 "$launcher" 2>/dev/null
    say "$1 came; the run is asked to write a checkpoint and stop"
}

start_timer() {
    [ -n "${stop_after:-}" ] || return 0
    [ "$stop_after" -gt 0 ] ||
        die 78 'the walltime is shorter than STOP_BEFORE: no time is left to train in'
    (
        trap 'kill "$!"' TERM
        sleep "$stop_after" >/dev/null 2>&1 &
        wait "$!" && kill -USR1 $$
    ) 2>/dev/null &
    timer=$!
}

# Runs the program; $rc is what the launcher returned. A signal ends `wait` early.
run_program() {
    local seen
    [ -z "$stop_by" ] || die 75 "$stop_by came before the run had begun: is the time limit too short?"
    "${LAUNCH[@]}" "$MD_HPC" "$CONFIG" "${OVERRIDES[@]}" &
    launcher=$!
    [ -z "$stop_by" ] || kill -USR1 "$launcher"
    while :; do
        seen=$signals
        wait "$launcher"
        rc=$?
        [ "$seen" != "$signals" ] || break
    done
    launcher=''
    [ -z "$timer" ] || kill "$timer" 2>/dev/null
}

# ---- what follows ----

# go_on STEP_BEFORE: the run has stopped with a checkpoint and is not done.
go_on() {
    local step
    step=$(status_value step)
    [ "$stop_by" != TERM ] || die 75 "stopped by TERM at step $step with a checkpoint: the job was" \
        "cancelled or preempted, and is not queued again from here"
    [ $((step - $1)) -ge "$MIN_STEPS" ] || die 75 "no progress: the run went from step $1 to step" \
        "$step, and a job has to make MIN_STEPS=$MIN_STEPS; not started again. Is the time limit" \
        "too short for the signal before its end?"
    [ "$restarts" -lt "$MAX_RESTARTS" ] || die 75 "stopped at step $step with a checkpoint, and not" \
        "started again: $restarts restarts, MAX_RESTARTS=$MAX_RESTARTS"
    say "stopped at step $step with a checkpoint; the next job goes on (restart $((restarts + 1)))"
    job_again || die 75 "no next job; the checkpoint is there: submit the same script again"
}

# decide OLD_STATUS OLD_STEP: a status that has not changed is an earlier job's.
decide() {
    local state code
    state=$(status_value state)
    [ "$(cat "$run_dir/status.json" 2>/dev/null)" != "$1" ] || state=none
    code=$((rc == 0 ? 70 : rc))
    case $state in
    finished) say "finished at step $(status_value step): $run_dir" ;;
    requeue) go_on "$2" ;;
    failed) die "$(status_value exit_code)" "failed at step $(status_value step):" \
        "$(status_value message)" ;;
    running) die "$code" "the run was killed after step $(status_value step), at which this job" \
        "began (${LAUNCH[0]} returned $rc): see the lines above; it goes on from its last checkpoint" ;;
    *) die "$code" "the run ended before training began (${LAUNCH[0]} returned $rc): see the" \
        "lines above" ;;
    esac
}

# job_main [key=value...]: all of it.
job_main() {
    local old old_step
    OVERRIDES+=("$@")
    trap 'signals=$((signals + 1)); on_signal USR1' USR1
    trap 'signals=$((signals + 1)); on_signal TERM' TERM
    site_file=$SITE
    [ -f "$site_file" ] || site_file=$(dirname "${BASH_SOURCE[0]}")/site/$SITE.env
    [ -r "$site_file" ] || die 66 "no site file $site_file (SITE=$SITE)"
    # shellcheck source=/dev/null
    . "$site_file"
    check_program
    check_paths
    check_gpus
    launch_line
    old=$(cat "$run_dir/status.json" 2>/dev/null) old_step=$(status_value step)
    say "$ranks ranks on $nodes nodes, $cpus_per_rank cores a rank, $restarts restarts, $run_dir at" \
        "step ${old_step:-0}"
    say "starts$(printf ' %q' "${LAUNCH[@]}" "$MD_HPC" "$CONFIG" "${OVERRIDES[@]}")"
    start_timer
    run_program
    decide "$old" "${old_step:-0}"
}
