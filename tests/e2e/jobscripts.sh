#!/bin/bash
# The job scripts with made-up schedulers: what they launch, how they end, when they go on. At last a
# run under the real mpirun is stopped through the PBS script and goes on in its next job.
# shellcheck disable=SC2016 # the stubs expand their variables themselves
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh
export FAKE=$scratch/fake
bin=$FAKE/bin run="$scratch/a run"
mkdir -p "$bin" "$FAKE/on login"

# stub NAME <script: a command of this name that first notes how it was called in $FAKE/NAME.
stub() {
    { printf '#!/bin/bash\nprintf "%%s\\n" "$@" >>%q\n' "$FAKE/$1" && cat; } >"$bin/$1"
    chmod +x "$bin/$1"
}

# A launcher writes the status that the program would: $FAKE/status at once, or $FAKE/on_usr1 when it
# is asked to stop; then it returns $FAKE/rc.
for name in srun mpirun mpiexec; do
    stub "$name" <<'END'
echo "$OMP_NUM_THREADS" >"$FAKE/omp"
put() { [ ! -e "$1" ] || cp "$1" "$FAKE_RUN/status.json"; }
if [ -e "$FAKE/on_usr1" ]; then
    trap 'echo USR1 >>"$FAKE/signals"; put "$FAKE/on_usr1"; exit 75' USR1
    put "$FAKE/status"
    touch "$FAKE/started"
    for ((i = 0; i < 500; i++)); do sleep 0.02; done
fi
put "$FAKE/status"
exit "$(cat "$FAKE/rc")"
END
done
stub squeue <<<'cat "$FAKE/job_state"'
stub scontrol <<<'exit "$(cat "$FAKE/scontrol_rc")"'
stub qsub <<<'cat "$FAKE/qsub_out" && exit "$(cat "$FAKE/scontrol_rc")"'
stub qstat <<<'echo "Job Id: 7"; echo "    Resource_List.walltime = $(cat "$FAKE/walltime")"'
stub nvidia-smi <<<'cat "$FAKE/gpus"'
PATH=$bin:$PATH
export FAKE_RUN=$run

# fresh: no calls so far, a scheduler that does as it is told, a launcher that returns 143.
fresh() {
    rm -rf "$run" "$FAKE"/{srun,mpirun,mpiexec,squeue,scontrol,qsub,nvidia-smi} \
        "$FAKE"/{status,on_usr1,started,signals}
    mkdir "$run"
    echo RUNNING >"$FAKE/job_state"
    echo 0 >"$FAKE/scontrol_rc"
    echo 143 >"$FAKE/rc"
    echo 24:00:00 >"$FAKE/walltime"
    echo 8.server >"$FAKE/qsub_out"
    for i in 0 1 2 3; do echo "GPU $i: a card (UUID: GPU-$i)"; done >"$FAKE/gpus"
    unset MD_CHAIN SLURM_RESTART_COUNT
}

# status STATE STEP CODE [MESSAGE]: as the program writes it, each time another.
written=0
status() {
    written=$((written + 1))
    printf '{\n  "state": "%s",\n  "step": %d,\n  "exit_code": %d,\n  "message": "%s",\n  "time": "%d"\n}\n' \
        "$1" "$2" "$3" "${4:-}" "$written"
}

# script FILE: a copy as its user would edit it, with these lines instead.
config=$scratch/tiny.cfg overrides=("data.train=$scratch/tiny.h5" "run.dir=$run" backend=cuda)
site=$scratch/here.env
echo 'RETRY_PAUSE=0' >"$site"
script() {
    local words
    words=$(printf '%q ' "${overrides[@]}")
    awk -v words="$words" '
        BEGIN { gsub(/\\/, "\\\\", words) }
        /^OVERRIDES=\(/ { print "OVERRIDES=(" words ")"; inside = 1 }
        inside { if (/^\)/) inside = 0; next }
        { print }' "$1" |
        sed -e "s|^MD_HPC=.*|MD_HPC=$program|" -e "s|^CONFIG=.*|CONFIG=$config|" \
            -e "s|^SITE=.*|SITE=$site|" -e "s|^SCRIPT=.*|SCRIPT=${named:-train.pbs}|"
}
# The scripts look for common.sh beside the program.
program=$FAKE/install/bin/md_hpc
mkdir -p "$FAKE/install/bin" "$FAKE/install/share/md_hpc"
cp -r jobscripts "$FAKE/install/share/md_hpc/"
ln -s "$MD_HPC" "$program"

# slurm [key=value...], pbs: a job on 16 nodes; $rc, and its output in $log. slurm_start and pbs_start
# leave it in the background; $job is its process.
slurm_start() {
    script jobscripts/slurm/train.sbatch >"$FAKE/script"
    SLURM_JOB_ID=7 SLURM_JOB_NUM_NODES=16 SLURM_NTASKS=64 SLURM_CPUS_PER_TASK=16 \
        SLURM_GPUS_ON_NODE=4 bash "$FAKE/script" "$@" >"$log" 2>&1 &
    job=$!
}
for ((i = 0; i < 64; i++)); do echo "node$((i / 4))"; done >"$FAKE/nodes"
pbs_start() {
    script jobscripts/pbs/train.pbs >"$FAKE/on login/train.pbs"
    PBS_JOBID=7.server PBS_O_WORKDIR="$FAKE/on login" PBS_NODEFILE=${nodes:-$FAKE/nodes} NCPUS=64 \
        bash "$FAKE/on login/train.pbs" >"$log" 2>&1 &
    job=$!
}
slurm() {
    slurm_start "$@"
    rc=0
    wait "$job" || rc=$?
}
pbs() {
    pbs_start
    rc=0
    wait "$job" || rc=$?
}

# called NAME WORDS...: once, with these words among others.
called() {
    local name=$1 word
    shift
    for word in "$@"; do
        [ "$(grep -cFx -- "$word" "$FAKE/$name")" = 1 ] ||
            { cat "$FAKE/$name" && fail "$name was not called once with $word"; }
    done
}
not_called() {
    local name
    for name in "$@"; do [ ! -e "$FAKE/$name" ] || fail "$name was called"; done
}
ends() { # CODE
    [ "$rc" = "$1" ] || fail "exit code $rc instead of $1"
}

# ---- the launch line ----
fresh
status finished 20 0 >"$FAKE/status"
slurm 'run.seed=9' "method.teacher.weights=a \"b\" 'c' \$d *"
ends 0
says "64 ranks on 16 nodes, 16 cores a rank" "finished at step 20"
called srun -K1 --nodes=16 --ntasks=64 --ntasks-per-node=4 --cpus-per-task=16 --cpu-bind=cores \
    --gpu-bind=none "$program" "$config" "run.dir=$run" run.seed=9 \
    "method.teacher.weights=a \"b\" 'c' \$d *"
[ "$(cat "$FAKE/omp")" = 16 ] || fail "OMP_NUM_THREADS"
not_called scontrol
for line in --nodes=16 --ntasks-per-node=4 --gpus-per-node=4 --requeue --open-mode=append; do
    grep -qFx -- "#SBATCH $line" jobscripts/slurm/train.sbatch || fail "train.sbatch lacks $line"
done
grep -q '^#SBATCH --signal=.*USR1@300$' jobscripts/slurm/train.sbatch || fail "no signal"

fresh
status finished 20 0 >"$FAKE/status"
pbs
ends 0
called mpirun -np 64 ppr:4:node:PE=16 --hostfile "$FAKE/nodes" "run.dir=$run" OMP_NUM_THREADS
not_called qsub
grep -qFx '#PBS -l select=16:ncpus=64:ngpus=4:mpiprocs=4' jobscripts/pbs/train.pbs || fail "no select"

fresh
status finished 20 0 >"$FAKE/status"
{ cat "$site" && echo 'LAUNCHER=hydra MPIRUN_ARGS=(-verbose) THREADS=3'; } >"$scratch/hydra.env"
site=$scratch/hydra.env pbs
ends 0
called mpiexec -n 64 -ppn core:16 -f -verbose
[ "$(cat "$FAKE/omp")" = 3 ] || fail "OMP_NUM_THREADS is not the site's"
for name in jobscripts/site/*.env; do
    fresh
    status finished 20 0 >"$FAKE/status"
    site=$(basename "$name" .env) slurm
    ends 0
done

# ---- the next job ----
fresh
status requeue 10 75 >"$run/status.json"
status requeue 20 75 'stopped' >"$FAKE/status"
slurm
ends 0
says "at step 10" "stopped at step 20 with a checkpoint; the next job goes on (restart 1)"
called scontrol requeue 7
status requeue 20 75 'stopped again' >"$FAKE/status"
slurm
ends 75
says "no progress: the run went from step 20 to step 20"
called scontrol requeue # not a second time

fresh
status requeue 20 75 >"$FAKE/status"
echo COMPLETING >"$FAKE/job_state" # scancel
slurm
ends 75
says "the job is COMPLETING, and left to Slurm"
not_called scontrol
echo RUNNING >"$FAKE/job_state"
echo 1 >"$FAKE/scontrol_rc"
status requeue 40 75 >"$FAKE/status"
slurm
ends 75
says "scontrol requeue 7 failed" "submit the same script again"
[ "$(grep -c requeue "$FAKE/scontrol")" = 3 ] || fail "not tried three times"

fresh
status requeue 20 75 >"$FAKE/status"
SLURM_RESTART_COUNT=100 slurm
ends 78
says "100 jobs came before this one, but $run is new"
status requeue 5 75 >"$run/status.json"
SLURM_RESTART_COUNT=100 slurm
ends 75
says "MAX_RESTARTS=100"
not_called scontrol

fresh
status requeue 30 75 >"$FAKE/status"
export MD_CHAIN=4
status requeue 5 75 >"$run/status.json"
pbs
ends 0
called qsub -v MD_CHAIN=5 train.pbs
says "the next job is 8.server"
echo 1 >"$FAKE/scontrol_rc"
status requeue 60 75 >"$FAKE/status"
pbs
ends 75
says "qsub train.pbs failed"
{ cat "$site" && grep -h 'qsub()' jobscripts/site/generic.env | cut -c2-; } >"$scratch/login.env"
stub ssh <<<'echo 9.server'
status requeue 90 75 >"$FAKE/status"
site=$scratch/login.env pbs
ends 0
called ssh LOGIN_NODE "cd $(printf %q "$FAKE/on login") && qsub -v MD_CHAIN=5 train.pbs"

# ---- other ends ----
fresh
status failed 12 65 'more than data.max_bad: \"x\\y\"' >"$FAKE/status"
slurm
ends 65
says 'failed at step 12: more than data.max_bad: "x\y"'
fresh
status running 3 0 >"$FAKE/status"
slurm
ends 143
says "the run was killed after step 3" "srun returned 143"
for old in finished requeue failed; do # of an earlier job: this one ended before it wrote any
    fresh
    status "$old" 20 0 >"$run/status.json"
    echo 78 >"$FAKE/rc"
    slurm
    ends 78
    says "ended before training began (srun returned 78)"
    not_called scontrol
done
echo 0 >"$FAKE/rc"
slurm
ends 70

# ---- checks ----
fresh
config=nowhere.cfg slurm
ends 66
says "nowhere.cfg"
slurm optim.lrr=1
ends 78
says "optim.lrr" "an override has errors"
slurm "data.train=$scratch/not there.h5"
ends 66
says "data.train: $scratch/not there.h5 cannot be read"
slurm data.train=
ends 78
says "data.train is not set"
slurm "run.dir=$config/x"
ends 73
says "run directory $config/x cannot be written"
sed -i 4d "$FAKE/gpus"
slurm
ends 69
says "shows 3 GPUs for 4 ranks"
site=nowhere slurm
ends 66
says "no site file"
program=$scratch/none slurm
ends 66
says "no program $scratch/none"
named=other.pbs pbs
ends 66
says "SCRIPT=other.pbs is not there"
not_called srun mpirun

# ---- signals ----
# asked JOB: starts one (slurm_start, pbs_start) whose launcher waits for USR1.
asked() {
    fresh
    status running 0 0 >"$FAKE/status"
    status requeue 50 75 >"$FAKE/on_usr1"
    [ -z "${walltime:-}" ] || echo "$walltime" >"$FAKE/walltime"
    "$1"
    until_true 10 test -e "$FAKE/started"
}
# stopped CODE: it got one USR1, and ends so.
stopped() {
    ended "$1"
    [ "$(cat "$FAKE/signals")" = USR1 ] || fail "the launcher had not one USR1"
}
asked slurm_start
kill -USR1 "$job"
stopped 0
called scontrol requeue 7
asked slurm_start
kill -TERM "$job" # scancel
stopped 75
says "stopped by TERM"
not_called scontrol
walltime=0:05:03 asked pbs_start # the timer, after three seconds
stopped 0
says "USR1 came" "the next job is 8.server"
asked pbs_start
kill -TERM "$job" # qdel
stopped 75
not_called qsub

fresh
echo 0:05:00 >"$FAKE/walltime"
pbs
ends 78
says "the walltime is shorter than STOP_BEFORE"
echo >"$FAKE/walltime"
status finished 60 0 >"$FAKE/status"
pbs
ends 0
says "warning: qstat tells no walltime"

# ---- a real run ----
fresh
rm "$bin/mpirun" "$bin/nvidia-smi"
[ "$MPIRUN" = mpirun ] || printf '#!/bin/bash\nexec "%s" "$@"\n' "$MPIRUN" >"$bin/mpirun"
[ ! -e "$bin/mpirun" ] || chmod +x "$bin/mpirun"
hash -r
"$MPIRUN" --version 2>&1 | grep -q 'Open MPI' || { echo ok && exit; }
{ cat "$site" && echo 'LAUNCH=(mpirun -np 2 -x OMP_NUM_THREADS) THREADS=1'; } >"$scratch/two.env"
nodes=$FAKE/two site=$scratch/two.env
printf '%s\n' "$HOSTNAME" "$HOSTNAME" >"$nodes"
long=("data.train=$scratch/tiny.h5" "run.dir=$run" train.epochs=1e6 checkpoint.every=100000)
overrides=("${long[@]}" train.max_steps=100000000)
pbs_start
until_true 60 at_step 'a run' 20
kill -USR1 "$job"
ended 0
says "USR1 came" "stopped at step" "the next job is 8.server"
step=$(curve 'a run' | tail -n 1 | cut -d' ' -f1)
overrides=("${long[@]}" train.max_steps=$((step + 3)))
MD_CHAIN=1 pbs
ends 0
says "resumed from $run/checkpoints" "finished at step $((step + 3))"
whole 'a run' $((step + 3))
echo ok
