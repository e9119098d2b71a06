#!/usr/bin/env bash
# launch/rank.sh MODULE [ARGUMENT...]: one process of a run on several nodes, for DeepSpeed's launcher or srun. What it prints
# goes into OUTPUT_DIR/ranks/rank_N.txt too, behind what it printed before a restart.
set -euo pipefail
if [ -z "${RANK:-}" ]; then # srun's names for it
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_SIZE=${SLURM_NTASKS_PER_NODE%%(*}
fi
[ -z "${NODE_GPUS:-}" ] || export CUDA_VISIBLE_DEVICES=$NODE_GPUS
# shellcheck disable=SC2086 # a command and its arguments
set -- ${CONTAINER:-} python -m "$@"
# Told before the output goes through `tee`, which Slurm may end before it has written.
command -v "$1" >/dev/null || { echo "error: rank $RANK: $1: command not found; see VENV, CONDA_ENV and CONTAINER" >&2; exit 127; }
mkdir -p "$OUTPUT_DIR/ranks"
# A signal to all is meant for the training, whose last words are still to be written.
exec > >(trap '' INT TERM USR1 HUP; exec tee -a "$OUTPUT_DIR/ranks/rank_$RANK.txt") 2>&1
exec "$@"
