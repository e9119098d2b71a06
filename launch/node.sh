#!/usr/bin/env bash
# Train on this machine: all its GPUs, or CPU processes when it has none.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: [NAME=value ...] launch/node.sh [key=value ...]

Everything is set by environment variables; key=value arguments override the config's YAML.

  CONFIG                        experiment (default train/configs/demo.yaml)
  DEVICES                       GPU numbers, as 0,1,2,3 (default: all, or CUDA_VISIBLE_DEVICES). Without a GPU: so many
                                CPU processes (default 1)
  OUTPUT_DIR                    default outputs/<config>/<time>. The same OUTPUT_DIR again continues that run
  TRAIN_BATCH_SIZE_PER_GPU      samples a GPU holds at a time. The YAML's global batch stays, accumulation follows
  GLOBAL_BATCH_SIZE             samples in one optimizer step, over all GPUs
  RESUME_FROM                   a run's output folder, or one checkpoint in it, to continue from
  LOAD_FROM                     weights to start from: .pth or .safetensors
  mode                          multi-gpu (default), or debug: one process, no loader workers, breakpoint() works

Relative paths start at the repository's root.

  CONFIG=train/configs/face_1b.yaml LOAD_FROM=sapiens_1b_pretrain.pth launch/node.sh data.train=shards/train
EOF
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
cd "$(dirname "$0")/.."
command -v deepspeed >/dev/null || PATH="$PWD/.venv/bin:$PATH" # the active environment first, else the one `make` built

CONFIG=${CONFIG:-train/configs/demo.yaml}
OUTPUT_DIR=${OUTPUT_DIR:-outputs/$(basename "$CONFIG" .yaml)/$(date +%Y-%m-%d_%H-%M-%S)}
arguments=(--config "$CONFIG" "output_dir=$OUTPUT_DIR")
[ -n "${TRAIN_BATCH_SIZE_PER_GPU:-}" ] && arguments+=("micro_batch_size=$TRAIN_BATCH_SIZE_PER_GPU")
[ -n "${GLOBAL_BATCH_SIZE:-}" ] && arguments+=("global_batch_size=$GLOBAL_BATCH_SIZE")
[ -n "${RESUME_FROM:-}" ] && arguments+=("resume_from=$RESUME_FROM")
[ -n "${LOAD_FROM:-}" ] && arguments+=("load_from=$LOAD_FROM")
for argument in "$@"; do
  case "$argument" in output_dir=*) echo "error: $argument: set the variable OUTPUT_DIR instead" >&2; exit 2 ;; esac
done
arguments+=("$@")
[[ ${DEVICES:-0} =~ ^[0-9]+(,[0-9]+)*,?$ ]] || { echo "error: DEVICES: '$DEVICES' is not a list of numbers as 0,1,2" >&2; exit 2; }

case "${mode:-multi-gpu}" in
  debug) [ -z "${DEVICES:-}" ] || export CUDA_VISIBLE_DEVICES=${DEVICES%%,*}; exec python -m train "${arguments[@]}" data.workers=0 ;;
  multi-gpu) ;;
  *) echo "error: mode: '$mode' is neither multi-gpu nor debug" >&2; exit 2 ;;
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
  [ "$last" -lt "$gpus" ] || { echo "error: DEVICES: there is no GPU $last, the machine has $gpus (0 to $((gpus - 1)))" >&2; exit 2; }
  place=(--include "localhost:$listed")
fi
# Mistakes are told once and at once here, not by every process after its start.
WORLD_SIZE=$processes python -m train --check "${arguments[@]}" >/dev/null
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

started=$(mktemp)
told=$(wc -l "$OUTPUT_DIR/log.txt" 2>/dev/null | cut -d ' ' -f 1) || told=0 # lines of the log
rm -f "$OUTPUT_DIR/stop" # meant for a run before
export NODE_SH_PID=$$ # when this script is killed, the run saves and ends as well
set -m # the launcher gets a process group of its own: Ctrl-C reaches this script alone, which asks the run to save
python -m deepspeed.launcher.runner --log_level warning "${place[@]}" --master_port "$port" --no_local_rank --module train "${arguments[@]}" &
launcher=$!
asked=
stop() {
  if [ -z "$asked" ]; then
    asked=1
    mkdir -p "$OUTPUT_DIR" && touch "$OUTPUT_DIR/stop"
    echo "$1: the run saves after its step and ends; once more ends it at once" >&2
  else
    while kill -KILL -- "-$launcher" 2>/dev/null; do sleep 0.1; done
  fi
}
for name in INT TERM USR1 HUP QUIT; do trap "stop $name" "$name"; done
code=0
while wait "$launcher" && code=0 || code=$?; kill -0 "$launcher" 2>/dev/null; do :; done # a signal ends a wait early
# The launcher also returns 0 when its own child was killed: only the finished model proves the run.
if [ "$code" != 0 ] || [ ! "$OUTPUT_DIR/model.safetensors" -nt "$started" ]; then
  # When a signal has ended the launcher itself, its processes save first.
  for ((tenths = 0; tenths < 700; tenths++)); do kill -0 -- "-$launcher" 2>/dev/null || break; sleep 0.1; done
  if tail -n "+$((told + 1))" "$OUTPUT_DIR/log.txt" 2>/dev/null | grep -q "stops after step"; then
    code=75
  elif [ "$code" = 0 ]; then
    echo "error: the run ended without a model; see $OUTPUT_DIR/log.txt, then start it again to continue" >&2
    code=1
  fi
fi
rm -f "$started"
exit "$code"
