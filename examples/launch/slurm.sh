#!/bin/bash
# A run on several nodes of a SLURM cluster, one task per GPU.
#
#     sbatch examples/launch/slurm.sh config.toml [further options of gvpo train]
#
# All nodes must see the run folder. Two minutes before the time limit SLURM sends USR1 to the tasks. The run then saves
# and ends with status 138, and the job is queued again and resumes from that checkpoint.
#SBATCH --job-name=gvpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # different ports for two jobs on one node
export MASTER_ADDR MASTER_PORT

# shellcheck disable=SC2016  # each task expands its own variables
srun --kill-on-bad-exit=0 bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec gvpo train "$@"' gvpo "$@"
status=$?
if [ $status = 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
