#!/usr/bin/env bash
# launch/node_task.sh COMMAND...: srun's task on a node when DeepSpeed's launcher starts the ranks. Slurm's signals reach this
# process alone, and the launcher would die of them: they become the file `stop`, on which all ranks save. A word NODE_RANK is
# replaced.
set -uo pipefail
export NODE_GPUS=${CUDA_VISIBLE_DEVICES:-} # the job's; the launcher counts from 0
trap 'touch "$OUTPUT_DIR/stop" "$OUTPUT_DIR/slurm/signalled"' TERM USR1
set -m
words=()
for word in "$@"; do
  if [ "$word" = NODE_RANK ]; then word=$SLURM_NODEID; fi
  words+=("$word")
done
"${words[@]}" &
while wait $!; code=$?; kill -0 $! 2>/dev/null; do :; done # a signal ends a wait early
exit "$code"
