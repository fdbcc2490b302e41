#!/bin/bash
# Pre-training under Slurm: one task a GPU, on as many nodes as you ask for. Submit it from the folder that holds your recipe and your data,
# with the environment active in which `fastbert` runs, and with whatever `fastbert pretrain` takes:
#
#   sbatch --nodes 4 examples/cluster/slurm.sh base.toml data=data/wiki
#
# It resumes from the newest checkpoint automatically, after its time limit or after the loss of a node, until the run is finished.

#SBATCH --job-name=fastbert
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8    # one a GPU
#SBATCH --gpus-per-node=8      # not --gpus-per-task: every task sees all GPUs of its node, and takes that of its LOCAL_RANK
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300      # to every task, 5 minutes before the limit: save, and exit with 75
#SBATCH --requeue              # Slurm itself starts the job again when a node is lost
#SBATCH --open-mode=append     # one log for all starts of the job
#SBATCH --output=slurm-%j.log

set -uo pipefail

# Where the ranks meet: the first node, at a port that differs from job to job.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over from sbatch

# Ranks end within seconds of each other, and the first must not have the others killed while they save. What is left behind by a lost node
# has to wait until Slurm has noticed (SlurmdTimeout, 300 s unless your site says otherwise): only then is the job requeued.
# shellcheck disable=SC2016  # the variables in quotes are those of each task
srun --kill-on-bad-exit=0 --wait=600 bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-1}
    exec fastbert pretrain "$@" --resume' fastbert "$@"
code=$? # the highest of all tasks

if [ "$code" -eq 75 ]; then
    echo "interrupted, a checkpoint is saved: requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
