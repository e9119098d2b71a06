# Sourced: a run's processes, from the moment before their start to the exit code that is true. Needs OUTPUT_DIR.
# shellcheck shell=bash

STOPPED=75 # train.interrupt.INTERRUPTED
beat=''    # not the environment's: what launch/hosts.sh keeps hosts going by

begin_run() {
  before=$(the_model)
  told=$(wc -l "$OUTPUT_DIR/log.txt" 2>/dev/null | cut -d ' ' -f 1) || told=0 # lines of the log
  rm -f "$OUTPUT_DIR/stop" # meant for a run before
}

# Which one lies there, if any: by what changes when another one takes its place.
the_model() { stat --format '%i %y %s' "$OUTPUT_DIR/model.safetensors" 2>/dev/null || true; }

is_finished() { local now; now=$(the_model); [ -n "$now" ] && [ "$now" != "$before" ]; }

# Whether the log's newer lines have such words.
log_says() { tail -n "+$((told + 1))" "$OUTPUT_DIR/log.txt" 2>/dev/null | grep -q "$1"; }

ask_to_stop() { mkdir -p "$OUTPUT_DIR" && touch "$OUTPUT_DIR/stop"; }

# Sets `code` to what the run came to. $1: the launcher's exit code, which is also 0 when its own child was killed: only the
# finished model proves the run.
judge_run() {
  code=$1
  if [ "$code" != 0 ] || ! is_finished; then
    if log_says "stops after step"; then
      code=$STOPPED
    elif [ "$code" = 0 ]; then
      echo "error: the run ended without a model; see $OUTPUT_DIR/log.txt, then start it again to continue" >&2
      code=1
    fi
  fi
}

# Runs a launcher, "$@", to its end; sets `code`. A first signal asks the run to save and end, a second one ends it at once.
supervise() {
  begin_run
  set -m # the launcher gets a process group of its own: Ctrl-C reaches this script alone
  "$@" &
  launcher=$!
  asked=
  local name
  # shellcheck disable=SC2064 # the name as it is now
  for name in INT TERM USR1 HUP QUIT; do trap "take_signal $name" "$name"; done
  local last=0
  while wait "$launcher" 2>/dev/null && last=0 || last=$?; kill -0 "$launcher" 2>/dev/null; do :; done # a signal ends a wait early
  if [ "$last" != 0 ] || ! is_finished; then
    # When a signal has ended the launcher itself, its processes save first.
    local tenths
    for ((tenths = 0; tenths < 700; tenths++)); do kill -0 -- "-$launcher" 2>/dev/null || break; sleep 0.1; done
  fi
  judge_run "$last"
}

take_signal() {
  if [ -z "$asked" ]; then
    asked=1
    ask_to_stop
    echo "$1: the run saves after its step and ends; once more ends it at once" >&2
  elif [ -n "${beat:-}" ]; then
    rm -f "$beat" # launch/hold.sh ends what runs on the hosts
  else
    while kill -KILL -- "-$launcher" 2>/dev/null; do sleep 0.1; done
  fi
}
