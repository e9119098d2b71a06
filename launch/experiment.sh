# Sourced: the variables that node.sh, multinode.sh and slurm.sh share, as arguments of `python -m train`.
# shellcheck shell=bash

experiment_help() {
  cat <<'TEXT'
  CONFIG                        experiment (default train/configs/demo.yaml)
  OUTPUT_DIR                    default outputs/<config>/<time>. The same OUTPUT_DIR again continues that run
  TRAIN_BATCH_SIZE_PER_GPU      samples a GPU holds at a time. The YAML's global batch stays, accumulation follows
  GLOBAL_BATCH_SIZE             samples in one optimizer step, over all GPUs
  RESUME_FROM                   a run's output folder, or one checkpoint in it, to continue from
  LOAD_FROM                     weights to start from: .pth or .safetensors
  VENV, CONDA_ENV               a virtual environment's folder, or the name of one of conda's
                                (default: the active one, else .venv)
TEXT
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "error: bash $BASH_VERSION: 4.4 or newer is needed" >&2; exit 2; }

# Of a job that this shell belongs to: a new job, or a run on other hosts, would take itself for that one.
forget_outer_job() {
  local name
  for name in $(compgen -e SLURM_); do
    case "$name" in SLURM_CONF | SLURM_CLUSTERS) ;; *) unset "$name" ;; esac
  done
}

refuse() { echo "error: $*" >&2; exit 2; }

# A path as YAML reads it back, whatever is in it: values of overrides are YAML.
quoted() { printf "'%s'" "${1//\'/\'\'}"; }

# Sets CONFIG, OUTPUT_DIR and the array `arguments`. "$@": key=value overrides.
read_experiment() {
  CONFIG=${CONFIG:-train/configs/demo.yaml}
  OUTPUT_DIR=${OUTPUT_DIR:-outputs/$(basename "$CONFIG" .yaml)/$(date +%Y-%m-%d_%H-%M-%S)}
  local argument
  for argument in "$@"; do
    case "$argument" in output_dir=*) refuse "$argument: set the variable OUTPUT_DIR instead" ;; esac
  done
  arguments=(--config "$CONFIG" "output_dir=$(quoted "$OUTPUT_DIR")")
  [ -z "${TRAIN_BATCH_SIZE_PER_GPU:-}" ] || arguments+=("micro_batch_size=$TRAIN_BATCH_SIZE_PER_GPU")
  [ -z "${GLOBAL_BATCH_SIZE:-}" ] || arguments+=("global_batch_size=$GLOBAL_BATCH_SIZE")
  [ -z "${RESUME_FROM:-}" ] || arguments+=("resume_from=$(quoted "$RESUME_FROM")")
  [ -z "${LOAD_FROM:-}" ] || arguments+=("load_from=$(quoted "$LOAD_FROM")")
  arguments+=("$@")
}

# Mistakes are told once and at once, not by every process after its start. $1: processes of the run.
check_experiment() {
  local kind=(--for-gpus) # this machine may have none, those that train will
  [ "${DS_ACCELERATOR:-}" != cpu ] || kind=()
  WORLD_SIZE=$1 python -m train --check "${kind[@]}" "${arguments[@]}" >/dev/null
}

is_whole() { [[ $1 =~ ^[1-9][0-9]*$ ]]; }
