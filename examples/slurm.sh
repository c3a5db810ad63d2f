#!/bin/bash
# Train on two nodes of eight GPUs under Slurm, and go on in a new allocation when the time is over:
#
#     sbatch examples/slurm.sh qwen_math_7b --run-dir runs/math-7b
#
# Five minutes before the end Slurm sends USR1 to this script alone (B: below). torchrun would die of USR1 and passes no
# signal on without killing its ranks half a minute later, so the script sends USR1 to the ranks themselves: they
# finish their step, save a checkpoint and leave, and the job is put into the queue again. --resume auto continues it.
# Raise the 300 seconds when a step and a checkpoint take longer. The run folder must be on a file system that all
# nodes see, and so must the model and data (HF_HOME).

#SBATCH --job-name=paced
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u
if (($# == 0)) || [[ " $* " != *" --run-dir"[\ =]* ]]; then
    echo "usage: sbatch $0 PRESET --run-dir FOLDER [--field value ...]" >&2
    exit 2
fi

gpus=${SLURM_GPUS_ON_NODE:-8}
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
export AGENT_FILE=/tmp/paced-$SLURM_JOB_ID.pid  # on each node, the process of its torchrun
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-64} / gpus))

was_asked=no
stop_ranks() {
    was_asked=yes
    echo "$(date '+%F %T') asking the ranks to stop"
    # The ranks are torchrun's children; what they started themselves is theirs to end.
    srun --overlap --ntasks="$SLURM_NNODES" --ntasks-per-node=1 bash -c 'pkill -USR1 -P "$(cat "$AGENT_FILE")"'
}
trap stop_ranks USR1

srun --kill-on-bad-exit=1 --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    bash -c 'echo $$ > "$AGENT_FILE"; exec "$@"' torchrun \
    torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$gpus" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-endpoint="$head_node:$port" --rdzv-id="$SLURM_JOB_ID" \
    -m paced_fast train "$@" --resume auto &
step=$!

# A trap ends `wait` early, with a status that is not the step's: wait again until the step is over.
wait "$step"
status=$?
while kill -0 "$step" 2> /dev/null; do
    wait "$step"
    status=$?
done

echo "$(date '+%F %T') the ranks left with status $status"
if [[ $was_asked == yes && $status == 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
