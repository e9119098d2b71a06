#!/usr/bin/env bash
# Train in a Slurm job that goes on by itself after a time limit, a preemption or a failed node.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/experiment.sh

usage() {
  cat <<'TEXT'
usage: [NAME=value ...] launch/slurm.sh [--dry-run] [key=value ...] [-- SBATCH_FLAG ...]

Checks everything, then submits a job. --dry-run prints its script and submits nothing. The variables of launch/node.sh:

TEXT
  experiment_help
  cat <<'TEXT'

And:

  NUM_NODES                     (default 4)
  GPUS_PER_NODE, GPU_TYPE       (default 8, of any type); with DS_ACCELERATOR=cpu so many CPU processes
  CPUS_PER_GPU                  (default 8), for the training process and its loader's workers
  PARTITION, TIME               as sbatch's --partition and --time
  WARNING                       so many seconds before the time limit the run saves, and is requeued (default 120, least 60)
  MAX_RESTARTS                  so many restarts without a new checkpoint are tried before the end (default 3)
  LAUNCHER                      srun (default): a task for each GPU; or deepspeed: its launcher on each node
  CONTAINER                     a command that Python is run by, as `apptainer exec --nv image.sif`
  NCCL_PROFILE                  infiniband, ethernet or debug
  PREFLIGHT                     0: do not look at the nodes before each start (launch/preflight.sh)
  PREFLIGHT_TIMEOUT             seconds that a node has to answer then, and all processes to meet (default 300)
  TEST_ONLY                     0: do not ask `sbatch --test-only` first, which refuses what waits for nodes that are drained

Flags behind -- are sbatch's: -- --account=vision --exclude=node7 --array=0-4. Each task of an array gets a folder in OUTPUT_DIR;
%a in key=value is its number. A file OUTPUT_DIR/stop, or scancel, ends the job for good.

  CONFIG=train/configs/face_1b.yaml OUTPUT_DIR=outputs/face_1b NUM_NODES=2 TIME=24:00:00 launch/slurm.sh -- --account=vision
TEXT
}

dry_run='' array='' overrides=() flags=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=1 ;;
    --) shift; flags=("$@"); break ;;
    -*) refuse "$1: flags of sbatch stand behind --" ;;
    *) overrides+=("$1") ;;
  esac
  shift
done
for flag in "${flags[@]}"; do
  case "$flag" in
    -N* | --nodes*) refuse "$flag: set the variable NUM_NODES instead" ;;
    --ntasks* | -n* | --gres | --gres=* | --gpus* | -G*) refuse "$flag: set the variables GPUS_PER_NODE and GPU_TYPE instead" ;;
    --cpus-per-* | -c*) refuse "$flag: set the variable CPUS_PER_GPU instead" ;;
    -t* | --time | --time=*) refuse "$flag: set the variable TIME instead" ;;
    -p* | --partition*) refuse "$flag: set the variable PARTITION instead" ;;
    --gpu-bind*) refuse "$flag: every task sees all GPUs of its node, and takes its own" ;;
    -a* | --array*) array=1 ;;
    --no-requeue | --signal* | --open-mode*) refuse "$flag: the job could not go on after an interruption" ;;
    --wrap* | -o* | --output* | -e* | --error*) refuse "$flag: the job has its own; its output goes into OUTPUT_DIR/slurm" ;;
  esac
done
source launch/environment.sh
NUM_NODES=${NUM_NODES:-4} GPUS_PER_NODE=${GPUS_PER_NODE:-8} CPUS_PER_GPU=${CPUS_PER_GPU:-8} WARNING=${WARNING:-120}
MAX_RESTARTS=${MAX_RESTARTS:-3} LAUNCHER=${LAUNCHER:-srun}
for name in NUM_NODES GPUS_PER_NODE CPUS_PER_GPU WARNING; do
  is_whole "${!name}" || refuse "$name: '${!name}' is not a whole number above 0"
done
[[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || refuse "MAX_RESTARTS: '$MAX_RESTARTS' is not a whole number"
[ "$WARNING" -ge 60 ] || refuse "WARNING: in $WARNING seconds nothing is saved; give 60 or more"
case "${overrides[*]}" in *%a*) [ -n "$array" ] || refuse "%a: is the number of an array's task; give -- --array=0-4" ;; esac
case "$LAUNCHER" in srun | deepspeed) ;; *) refuse "LAUNCHER: '$LAUNCHER' is neither srun nor deepspeed" ;; esac

# Slurm's ways to write a time, in seconds.
seconds_of() {
  local days=0 text=$1 parts
  if [[ $text == *-* ]]; then
    days=${text%%-*} text=${text#*-}
    [[ $text == *:* ]] || text+=:00 # D-HH
    [[ $text == *:*:* ]] || text+=:00
  fi
  IFS=: read -r -a parts <<<"$text"
  case ${#parts[@]} in
    1) echo $((10#${parts[0]} * 60)) ;;
    2) echo $((10#${parts[0]} * 60 + 10#${parts[1]})) ;;
    3) echo $((days * 86400 + 10#${parts[0]} * 3600 + 10#${parts[1]} * 60 + 10#${parts[2]})) ;;
  esac
}
if [ -n "${TIME:-}" ]; then
  [[ $TIME =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || refuse "TIME: '$TIME' is no time; write minutes, HH:MM:SS, or D-HH:MM:SS"
  [ "$(seconds_of "$TIME")" -ge $((WARNING + 120)) ] ||
    refuse "TIME: $TIME leaves no time to train before WARNING=$WARNING seconds of saving; give two minutes more than that"
fi

read_experiment
OUTPUT_DIR=$(realpath -m "$OUTPUT_DIR") # the job's own output, which Slurm opens, goes there
case "$OUTPUT_DIR" in *[\"\\]*) refuse "OUTPUT_DIR: $OUTPUT_DIR: sbatch takes no \" or \\ in a path" ;; esac
read_experiment "${overrides[@]//%a/0}" # a task's number
check_experiment $((NUM_NODES * GPUS_PER_NODE))

job_script() {
  local name output=${OUTPUT_DIR//%/%%}
  cat <<TEXT
#!/bin/bash
#SBATCH --job-name="$(basename "$CONFIG" .yaml)"
#SBATCH --nodes=$NUM_NODES
#SBATCH --ntasks-per-node=$GPUS_PER_NODE
#SBATCH --cpus-per-task=$CPUS_PER_GPU
TEXT
  [ "${DS_ACCELERATOR:-}" = cpu ] || echo "#SBATCH --gres=gpu:${GPU_TYPE:+$GPU_TYPE:}$GPUS_PER_NODE"
  [ -z "${PARTITION:-}" ] || echo "#SBATCH --partition=$PARTITION"
  [ -z "${TIME:-}" ] || echo "#SBATCH --time=$TIME"
  cat <<TEXT
#SBATCH --signal=B:USR1@$WARNING
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output="$output/slurm/job_%j.txt"
TEXT
  for name in CONFIG OUTPUT_DIR TRAIN_BATCH_SIZE_PER_GPU GLOBAL_BATCH_SIZE RESUME_FROM LOAD_FROM VENV CONDA_ENV GPUS_PER_NODE \
    CPUS_PER_GPU MAX_RESTARTS LAUNCHER CONTAINER NCCL_PROFILE PREFLIGHT PREFLIGHT_TIMEOUT DS_ACCELERATOR; do
    [ -z "${!name:-}" ] || echo "export $name=${!name@Q}"
  done
  echo "exec ${PWD@Q}/launch/job.sh ${overrides[*]@Q}"
}

if [ -n "$dry_run" ]; then
  job_script
  [ "${#flags[@]}" = 0 ] || echo "# submitted with: ${flags[*]@Q}"
  exit 0
fi
command -v sbatch >/dev/null || refuse "there is no sbatch here; submit from a machine of the cluster"
mkdir -p "$OUTPUT_DIR/slurm"
script=$(mktemp "$OUTPUT_DIR/slurm/.job.XXXXXX")
trap 'rm -f "$script"' EXIT
job_script >"$script"
forget_outer_job
[ "${TEST_ONLY:-1}" = 0 ] || sbatch --test-only "${flags[@]}" "$script" || refuse "Slurm would not take the job: see above." \
  "PARTITION, NUM_NODES, GPUS_PER_NODE, CPUS_PER_GPU or TIME ask for what no partition has; TEST_ONLY=0 submits it all the same"
job=$(sbatch --parsable --chdir="$PWD" "${flags[@]}" "$script")
job=${job%%;*} # behind it a cluster's name
saved=$OUTPUT_DIR/slurm/job_$job
cp "$script" "$saved.sh"
{ git describe --always --dirty --abbrev=40 --exclude='*' && git diff HEAD; } >"$saved.git.txt" 2>/dev/null || true
(umask 077; env -0 | grep -z -v -i -E '^[^=]*(key|token|secret|passw|cred|auth|_pat)' | sort -z | tr '\0' '\n' >"$saved.environment.txt")
echo "job $job; its output: $saved.txt"
echo "each process's: $OUTPUT_DIR/ranks; the run's: $OUTPUT_DIR/log.txt"
