#!/usr/bin/env bash
# Whether the hosts of a run are fit for it, before it starts.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/experiment.sh
source launch/supervise.sh
source launch/hosts.sh

usage() {
  cat <<'TEXT'
usage: [NAME=value ...] launch/preflight.sh

Looks at every host of HOSTFILE, or of the Slurm job that it runs in: GPUs healthy and idle, OUTPUT_DIR writable and the same
folder for all, room on the disk, the same code, packages and driver. Then all processes meet, as those of the training will,
add up numbers together, and compare their clocks. Exit code 0: fit. 1: what is not is named. launch/multinode.sh and
launch/slurm.sh do all this before they train.

  OUTPUT_DIR                    what the run will write into (default outputs/preflight)
  PREFLIGHT_TIMEOUT             seconds that a host has to answer, and all processes to meet (default 300)
  UNFIT                         a file for the names of unfit hosts, separated by commas
  GPUS_PER_NODE                 processes on each host of a Slurm job (default: its GPUs)
  VENV, CONDA_ENV               a virtual environment's folder, or the name of one of conda's
                                (default: the active one, else .venv)
  NCCL_PROFILE                  infiniband, ethernet or debug
TEXT
  hosts_help
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
[ $# = 0 ] || refuse "$1: preflight.sh takes variables only, see --help"
[ -z "${UNFIT:-}" ] || : >"$UNFIT"
PREFLIGHT_TIMEOUT=${PREFLIGHT_TIMEOUT:-300}
is_whole "$PREFLIGHT_TIMEOUT" || refuse "PREFLIGHT_TIMEOUT: '$PREFLIGHT_TIMEOUT' is not a whole number above 0"
source launch/environment.sh
export OUTPUT_DIR=${OUTPUT_DIR:-outputs/preflight} GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
read_hosts
facts=$(mktemp)
trap 'rm -f "$facts" "${beat:-}"' EXIT
trap 'exit 143' TERM INT HUP
# shellcheck disable=SC2086 # a command and its arguments
limit=$PREFLIGHT_TIMEOUT on_each_host ${CONTAINER:-} python -m train.preflight facts --name "{HOST}" --output-dir "$OUTPUT_DIR" --slots "{SLOTS}" >"$facts"
python -m train.preflight compare "$facts" --places "$places" --output-dir "$OUTPUT_DIR" ${UNFIT:+--unfit "$UNFIT"} || {
  grep -v '^{' "$facts" >&2 || true # ssh's, srun's and Python's own words
  exit 1
}
choose_master
start_ranks train.trial_sum --places "$places" --timeout "$PREFLIGHT_TIMEOUT" ${UNFIT:+--unfit "$UNFIT"}
