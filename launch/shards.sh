#!/usr/bin/env bash
# Pack a raw data set into shards by the tasks of a Slurm array; a job behind them writes the index.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/experiment.sh

usage() {
  cat <<'TEXT'
usage: [NAME=value ...] launch/shards.sh [--dry-run] --dataset NAME --root RAW --out OUT [...] [-- SBATCH_FLAG ...]

Checks everything, then submits two jobs: an array whose tasks make a share of the shards each (`python -m data.build_shards
--part i/TASKS`), and one that ends the build when all of them have succeeded. The arguments are those of data.build_shards,
which tells them with `python -m data.build_shards --help`; --part and --workers are given by this script. --dry-run prints
both jobs' scripts and submits nothing. RAW and OUT must be seen by all nodes under the same path.

  TASKS                         tasks of the array (default 8)
  CPUS_PER_TASK                 cores of each task, and its --workers (default 8)
  PARTITION, TIME               as sbatch's --partition and --time, for each of the two jobs
  VENV, CONDA_ENV               a virtual environment's folder, or the name of one of conda's
                                (default: the active one, else .venv)

Flags behind -- are sbatch's, for both jobs: -- --account=vision --mem=16G --exclude=node7. The jobs' output is in OUT/slurm.
Relative paths start at the repository's root.

When a task fails or is cancelled, the last job is cancelled too, and no index is written. OUT/slurm/part-* tells what was wrong
(of bad images also OUT/.progress/part-*.json). The same command again goes on: shards that are whole are not made again.

  TASKS=16 launch/shards.sh --dataset facesynthetics --root /data/dataset_100000 --out /data/shards/face -- --account=vision
TEXT
}

dry_run='' arguments=() flags=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=1 ;;
    --) shift; flags=("$@"); break ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
[ "${#arguments[@]}" -gt 0 ] || { usage >&2; exit 2; }
for flag in "${flags[@]}"; do
  case "$flag" in
    -a* | --ar*) refuse "$flag: set the variable TASKS instead" ;;
    -d* | --depend*) refuse "$flag: the last job has its own; start this script when the others have ended" ;;
    -c* | --cpus-per-t*) refuse "$flag: set the variable CPUS_PER_TASK instead" ;;
    -p* | --partition*) refuse "$flag: set the variable PARTITION instead" ;;
    -t* | --time=* | --time) refuse "$flag: set the variable TIME instead" ;;
    -o* | --output* | -e* | --error*) refuse "$flag: the output of the jobs goes into OUT/slurm" ;;
    --wrap* | -J* | --job-name*) refuse "$flag: the jobs have their own" ;;
  esac
done
TASKS=${TASKS:-8} CPUS_PER_TASK=${CPUS_PER_TASK:-8}
for name in TASKS CPUS_PER_TASK; do is_whole "${!name}" || refuse "$name: '${!name}' is not a whole number above 0"; done
source launch/environment.sh

for argument in "${arguments[@]}"; do
  case "$argument" in
    --pa*) refuse "$argument: the tasks of the array get it; set the variable TASKS instead" ;;
    --ch*) refuse "$argument: use --dry-run" ;;
    --w*) refuse "$argument: set the variable CPUS_PER_TASK instead" ;;
  esac
done
# Mistakes are told at once, not by every task after its wait in the queue.
out=$(python -m data.build_shards "${arguments[@]}" --check) || exit 2
out=$(realpath -m "$out") # Slurm opens the jobs' output there
case "$out" in *[\"\\]*) refuse "--out: $out: sbatch takes no \" or \\ in a path" ;; esac

# $1: part or merge; $2: the name of its output; $3: what the build gets besides, as it stands in a script.
job_script() {
  local name
  cat <<TEXT
#!/bin/bash
#SBATCH --job-name="shards-$1"
#SBATCH --cpus-per-task=$CPUS_PER_TASK
#SBATCH --output="${out//%/%%}/slurm/$2.txt"
TEXT
  [ "$1" != part ] || echo "#SBATCH --array=1-$TASKS"
  [ -z "${PARTITION:-}" ] || echo "#SBATCH --partition=$PARTITION"
  [ -z "${TIME:-}" ] || echo "#SBATCH --time=$TIME"
  echo "set -euo pipefail"
  echo "cd ${PWD@Q}"
  for name in VENV CONDA_ENV; do [ -z "${!name:-}" ] || echo "export $name=${!name@Q}"; done
  echo "source launch/environment.sh"
  echo "exec python -m data.build_shards ${arguments[*]@Q} --workers $CPUS_PER_TASK$3"
}
# shellcheck disable=SC2016 # the task's number is known to the task
array=$(job_script part 'part-%a_%A' ' --part "$SLURM_ARRAY_TASK_ID"'"/$TASKS")
merge=$(job_script merge 'merge_%j' '')

if [ -n "$dry_run" ]; then
  printf '%s\n\n%s\n' "$array" "$merge"
  echo "# submitted with: --dependency=afterok:ARRAY --kill-on-invalid-dep=yes"
  [ "${#flags[@]}" = 0 ] || echo "# both submitted with: ${flags[*]@Q}"
  exit 0
fi
command -v sbatch >/dev/null || refuse "there is no sbatch here; submit from a machine of the cluster"
forget_outer_job
sbatch --test-only "${flags[@]}" <<<"$array" || refuse "Slurm would not take the array: see above. PARTITION, TIME, TASKS," \
  "CPUS_PER_TASK or the flags behind -- ask for what it does not have"
mkdir -p "$out/slurm"
array_id=$(sbatch --parsable "${flags[@]}" <<<"$array")
array_id=${array_id%%;*} # behind it a cluster's name
if ! merge_id=$(sbatch --parsable "${flags[@]}" --dependency="afterok:$array_id" --kill-on-invalid-dep=yes <<<"$merge"); then
  scancel "$array_id"
  refuse "Slurm took the array but not the job behind it: see above. Both are cancelled"
fi
merge_id=${merge_id%%;*}
echo "job $array_id: $TASKS tasks make the shards; their output: $out/slurm/part-*_$array_id.txt"
echo "job $merge_id: ends the build when all have succeeded; its output: $out/slurm/merge_$merge_id.txt"
echo "squeue -j $array_id,$merge_id shows them. Should a task fail, the same command goes on from there"
