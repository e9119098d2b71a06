#!/usr/bin/env bash
# launch/rank.sh MODULE [ARGUMENT...]: one process of a run on several nodes, for DeepSpeed's launcher or srun. What it prints
# goes into OUTPUT_DIR/ranks/rank_N.txt too, behind what it printed before a restart.
set -euo pipefail
if [ -z "${RANK:-}" ]; then # srun's names for it
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_SIZE=${SLURM_NTASKS_PER_NODE%%(*}
fi
mkdir -p "$OUTPUT_DIR/ranks"
# A signal to all is meant for the training, whose last words are still to be written.
exec > >(trap '' INT TERM USR1 HUP; exec tee -a "$OUTPUT_DIR/ranks/rank_$RANK.txt") 2>&1
# shellcheck disable=SC2086 # a command and its arguments
exec ${CONTAINER:-} python -m "$@"
