#!/usr/bin/env bash
# Train on this machine: all its GPUs, or CPU processes when it has none.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/experiment.sh
source launch/supervise.sh

usage() {
  cat <<'TEXT'
usage: [NAME=value ...] launch/node.sh [key=value ...]

Everything is set by environment variables; key=value arguments override the config's YAML.

TEXT
  experiment_help
  cat <<'TEXT'
  DEVICES                       GPU numbers, as 0,1,2,3 (default: all, or CUDA_VISIBLE_DEVICES). Without a GPU: so many
                                CPU processes (default 1)
  mode                          multi-gpu (default), or debug: one process, no loader workers, breakpoint() works

Relative paths start at the repository's root.

  CONFIG=train/configs/face_1b.yaml LOAD_FROM=sapiens_1b_pretrain.pth launch/node.sh data.train=shards/train
TEXT
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
source launch/environment.sh
read_experiment "$@"
[[ ${DEVICES:-0} =~ ^[0-9]+(,[0-9]+)*,?$ ]] || refuse "DEVICES: '$DEVICES' is not a list of numbers as 0,1,2"

case "${mode:-multi-gpu}" in
  debug)
    [ -z "${DEVICES:-}" ] || export CUDA_VISIBLE_DEVICES=${DEVICES%%,*}
    exec python -m train "${arguments[@]}" data.workers=0 guard.hang_minutes=null ;;
  multi-gpu) ;;
  *) refuse "mode: '$mode' is neither multi-gpu nor debug" ;;
esac

count_gpus() { python -c 'import torch; print(torch.cuda.device_count())'; }
gpus=$(count_gpus)
listed=${DEVICES:-}
listed=${listed%,}
processes=$(awk -F, '{print NF}' <<<"$listed")
if [ "$gpus" = 0 ]; then
  [ "$processes" -gt 0 ] || processes=1
  place=(--num_gpus "$processes")
  export DS_ACCELERATOR=cpu
  # Keep freed activations in the process: the kernel would clear every page of them again in the next step.
  export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-2000000000} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4000000000}
elif [ "$processes" = 0 ]; then
  processes=$gpus
  place=() # the launcher takes all, or those of CUDA_VISIBLE_DEVICES
else
  unset CUDA_VISIBLE_DEVICES # the launcher numbers all of the machine's
  last=$(tr , '\n' <<<"$listed" | sort -n | tail -n 1)
  gpus=$(count_gpus)
  [ "$last" -lt "$gpus" ] || refuse "DEVICES: there is no GPU $last, the machine has $gpus (0 to $((gpus - 1)))"
  place=(--include "localhost:$listed")
fi
check_experiment "$processes"
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export NODE_SH_PID=$$ # when this script is killed, the run saves and ends as well
# In one line: bash reads a script while it runs it, and this one may be changed meanwhile.
supervise python -m deepspeed.launcher.runner --log_level warning "${place[@]}" --master_port "$port" --no_local_rank \
  --module train "${arguments[@]}"; exit "$code"
