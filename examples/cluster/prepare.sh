#!/bin/bash
# Prepares a large corpus under Slurm: an array of tasks, then one job that finishes. Run it (not by sbatch) in the folder that holds
# your text, with the environment active in which `fastbert` runs:
#
#   TASKS=64 examples/cluster/prepare.sh corpus/ --out data/web --vocab-size 30522
#
# All nodes must see the same files. Where a task fails, run the same line again: only what is missing is made.

set -euo pipefail

TASKS=${TASKS:-16}
command=(fastbert prepare "$@")
line=$(printf '%q ' "${command[@]}")
options=(--parsable --cpus-per-task=1 --mem=2G --time=4:00:00 --output=prepare-%A-%a.log)

# One task trains the vocabulary; otherwise every task would.
first=$(sbatch "${options[@]}" --job-name=prepare-first --wrap "$line --task 0/$TASKS")
encode=$(sbatch "${options[@]}" --job-name=prepare-encode --array="0-$((TASKS - 1))" --dependency="afterok:$first" \
    --wrap "$line --task \$SLURM_ARRAY_TASK_ID/$TASKS")
assemble=$(sbatch "${options[@]}" --job-name=prepare-assemble --array="0-$((TASKS - 1))" --dependency="afterok:$encode" \
    --wrap "$line --task \$SLURM_ARRAY_TASK_ID/$TASKS")
# A task that starts late may have finished the dataset already, and then this one has nothing to do.
sbatch "${options[@]}" --job-name=prepare-finish --dependency="afterok:$assemble" --wrap "$line --task 0/1"
