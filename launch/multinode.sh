#!/usr/bin/env bash
# Train on all hosts of a hostfile, reached by ssh.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/experiment.sh
source launch/supervise.sh
source launch/hosts.sh

usage() {
  cat <<'TEXT'
usage: [NAME=value ...] launch/multinode.sh [key=value ...]

The repository, the shards and OUTPUT_DIR lie at the same path on every host and on this machine; ssh asks for no password.
The variables of launch/node.sh:

TEXT
  experiment_help
  printf '\nAnd:\n\n'
  hosts_help
  cat <<'TEXT'
  NCCL_PROFILE                  infiniband, ethernet or debug
  PREFLIGHT                     0: do not look at the hosts before the start (launch/preflight.sh)
  PREFLIGHT_TIMEOUT             seconds that a host has to answer then, and all processes to meet (default 300)

DS_ACCELERATOR=cpu trains in CPU processes. Each process's output is in OUTPUT_DIR/ranks.

  HOSTFILE=hostfile CONFIG=train/configs/face_1b.yaml OUTPUT_DIR=outputs/face_1b launch/multinode.sh
TEXT
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
forget_outer_job
source launch/environment.sh
read_experiment "$@"
export OUTPUT_DIR CONTAINER=${CONTAINER:-}
read_hosts
check_experiment "$world"
if [ "${PREFLIGHT:-1}" != 0 ]; then
  set -m # a process group of its own, which ends with this script
  HOSTFILE=$hostfile launch/preflight.sh &
  checking=$!
  trap 'kill -TERM -- "-$checking"; exit 143' INT TERM HUP
  wait "$checking"
  trap - INT TERM HUP
  set +m
fi
choose_master
beat=$(mktemp)
trap 'rm -f "$beat"' EXIT
# In one line: bash reads a script while it runs it, and this one may be changed meanwhile.
supervise start_ranks train "${arguments[@]}"; exit "$code"
