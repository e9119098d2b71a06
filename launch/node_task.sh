#!/usr/bin/env bash
# launch/node_task.sh COMMAND...: srun's task on a node when DeepSpeed's launcher starts the ranks. Slurm's signals reach this
# process alone, and the launcher would die of them: they become the file `stop`, on which all ranks save. NODE_RANK is replaced.
set -uo pipefail
trap 'touch "$OUTPUT_DIR/stop" "$OUTPUT_DIR/slurm/signalled"' TERM USR1
set -m
"${@//NODE_RANK/$SLURM_NODEID}" &
while wait $!; code=$?; kill -0 $! 2>/dev/null; do :; done # a signal ends a wait early
exit "$code"
