#!/usr/bin/env bash
# As CONTAINER, what `python -m ...` is run by: a training is recorded and can be held (tests.cluster.held_run); a node of the
# file OUTPUT_DIR/broken_node does not even start what looks at it.
env >"$OUTPUT_DIR/environment_${RANK:-none}.txt"
case "$*" in
  "python -m train "*) exec python -m tests.cluster.held_run "${@:4}" ;;
  "python -m train.preflight facts --name $(cat "$OUTPUT_DIR/broken_node" 2>/dev/null) "*) echo "a broken node" >&2; exit 3 ;;
esac
exec "$@"
