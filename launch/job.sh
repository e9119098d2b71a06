#!/usr/bin/env bash
# What a job of launch/slurm.sh does: look at its nodes, train, and go on after an interruption. Not to be started by hand.
#
# Slurm's warning signal makes a file `stop` in OUTPUT_DIR, on which all ranks save at the same step; then the job is requeued.
# It is requeued after a failure too, as long as it makes progress: OUTPUT_DIR/slurm/starts.txt has a line for each start.
# bash 5.2 may lose a signal that comes between two $(...) of one command: there is one a line at most.
set -uo pipefail
asked=
trap 'ask USR1' USR1
trap 'ask TERM' TERM
trap 'late=1' ALRM
late=
# shellcheck disable=SC2317 # a trap calls it
ask() {
  asked=$1
  mkdir -p "$OUTPUT_DIR/slurm" && touch "$OUTPUT_DIR/slurm/signalled" # the file is not the user's
  ask_to_stop
}
cd "$(dirname "$0")/.." || exit
source launch/experiment.sh
source launch/supervise.sh
source launch/hosts.sh
source launch/environment.sh

say() { printf '%(%F %T)T job %s, start %s: %s\n' -1 "$job" "$restart" "$*"; }

# The step of the newest checkpoint.
newest_step() {
  local meta step=0
  for meta in "$OUTPUT_DIR"/checkpoints/step_*/run.json; do
    [ -e "$meta" ] && step=${meta%/run.json} && step=$((10#${step##*/step_}))
  done
  echo "$step"
}

# How many of this job's last starts in a row found the checkpoint that is now the newest.
starts_without_progress() {
  awk -v job="$job" -v step="$1" '$1 == job { n = $3 == step ? n + 1 : 0 } END { print n + 0 }' "$starts"
}

# Ends this script. $1: why; $2: nodes to leave out.
requeue() {
  trap '' TERM USR1 ALRM # requeueing ends this script as well
  local step count try
  step=$(newest_step)
  count=$(starts_without_progress "$step")
  if [ "$count" -gt "$MAX_RESTARTS" ]; then
    say "error: $1; not requeued: $MAX_RESTARTS restarts brought it no farther than step $step; mend what stands above or in" \
      "$OUTPUT_DIR/log.txt, then submit it again"
    exit "${code:-1}"
  fi
  say "requeued, to go on from step $step: $1"
  for ((try = 0; try < 24; try++)); do
    if scontrol requeue "$job"; then
      rm -f "$OUTPUT_DIR/stop" "$signalled" # a stop file that comes from now on is the user's
      [ -z "${2:-}" ] || leave_out "$2"
      exit "$STOPPED"
    fi
    sleep 5
  done
  say "error: cannot be requeued; submit it again, with the same OUTPUT_DIR"
  exit "$STOPPED"
}

# Keeps the job off nodes, separated by commas, if the partition has enough others: else it would wait for ever.
leave_out() {
  local before others nodes try
  before=$(scontrol show job "$job" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p')
  [ "$before" = "(null)" ] && before=
  nodes=$1${before:+,$before}
  nodes=$(scontrol show hostnames "$nodes")
  others=$(sinfo --noheader --Node --partition "$SLURM_JOB_PARTITION" --format '%N %t' |
    grep -v -E ' (down|drain|drng|fail|unk)' | cut -d ' ' -f 1 | sort -u | grep -c -v -x -F "$nodes")
  if [ "$others" -lt "$SLURM_JOB_NUM_NODES" ]; then
    say "$1: unfit, but not left out: only $others other nodes are there"
    return
  fi
  nodes=$(paste -s -d , <<<"$nodes")
  for ((try = 0; try < 40; try++)); do # possible as soon as it is pending
    scontrol update "JobId=$job" ReqNodeList= "ExcNodeList=$nodes" 2>/dev/null && say "left out from now on: $nodes" && return
    sleep 0.5
  done
  say "error: cannot be kept off $nodes"
}

# What is not saved 30 seconds before the time limit must be requeued by then, to go on from the last checkpoint: Slurm requeues
# no job that has reached its limit. A limit that is nearer than any WARNING is that of a preemption, which leaves less time.
watch_the_limit() {
  local end now rest
  end=$(SLURM_TIME_FORMAT=standard scontrol show job "$job" | sed -n 's/.*EndTime=\([^ ]*\).*/\1/p')
  end=$(date -d "$end" +%s) || { say "no end of the job is known: its time limit is not watched"; return; }
  printf -v now '%(%s)T' -1
  rest=$((end - now > 60 ? end - now - 30 : end - now - 3))
  [ "$rest" -le 0 ] || sleep "$rest"
  kill -ALRM $$
}

# Waits for a process, whatever signals come; sets last. Breaks off when it is late.
wait_for() {
  local watch=
  while wait "$1" 2>/dev/null && last=0 || last=$?; kill -0 "$1" 2>/dev/null; do
    [ -z "$late" ] || requeue "the time limit is here before it could save"
    if [ "$asked" = USR1 ] && [ -z "$watch" ]; then
      watch_the_limit &
      watch=$!
      disown "$watch" # bash tells the end of its jobs
    fi
  done
  [ -z "$watch" ] || kill "$watch" 2>/dev/null
}

# A function, which never returns, is read as a whole: bash reads a script while it runs it, and this one may be changed
# meanwhile.
main() {
  job=$SLURM_JOB_ID restart=${SLURM_RESTART_COUNT:-0}
  if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then # its id alone would requeue all tasks
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    OUTPUT_DIR=$OUTPUT_DIR/$SLURM_ARRAY_TASK_ID
    set -- "${@//%a/$SLURM_ARRAY_TASK_ID}"
  fi
  unset HOSTFILE INCLUDE EXCLUDE MASTER_ADDR MASTER_PORT # of the shell that submitted it
  export SLURM_EXPORT_ENV=ALL # whatever the job got, srun passes on
  starts=$OUTPUT_DIR/slurm/starts.txt signalled=$OUTPUT_DIR/slurm/signalled
  mkdir -p "$OUTPUT_DIR/slurm" && touch "$starts" || exit
  export OUTPUT_DIR GPUS_PER_NODE CONTAINER=${CONTAINER:-} SRUN_CPUS_PER_TASK=$CPUS_PER_GPU UNFIT=$OUTPUT_DIR/slurm/unfit.txt
  step=$(newest_step)
  count=$(starts_without_progress "$step")
  if [ "$count" -gt "$MAX_RESTARTS" ]; then # Slurm itself requeues a job whose node has failed
    say "error: $MAX_RESTARTS restarts brought it no farther than step $step; see $OUTPUT_DIR/log.txt, then submit it again"
    exit 1
  fi
  echo "$job $restart $step $SLURM_JOB_NODELIST" >>"$starts"
  say "on $SLURM_JOB_NODELIST, from step $step; $(git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null)"
  if [ "$restart" -gt 0 ] && [ -e "$OUTPUT_DIR/stop" ] && [ ! -e "$signalled" ]; then
    say "$OUTPUT_DIR/stop is there: ends"
    rm -f "$OUTPUT_DIR/stop"
    exit "$STOPPED"
  fi
  read_experiment "$@"
  rm -f "$signalled"
  begin_run
  [ -z "$asked" ] || ask "$asked" # begin_run has taken it for an old one
  set -m # what is started gets signals from here only
  if [ "${PREFLIGHT:-1}" != 0 ]; then
    launch/preflight.sh &
    wait_for $!
    [ "$asked" != TERM ] || exit 143
    [ "$asked" != USR1 ] || requeue "asked to leave before the training began"
    if [ "$last" != 0 ]; then
      code=$last
      unfit=$(cat "$UNFIT")
      unfit=${unfit%,}
      requeue "not fit: ${unfit:-the nodes together}" "$unfit"
    fi
  fi
  read_hosts
  choose_master || requeue "no port for the ranks to meet"
  start_ranks train "${arguments[@]}" &
  wait_for $!
  judge_run "$last"
  say "ended with exit code $code"
  [ "$code" != 0 ] || exit 0
  [ "$asked" != TERM ] || exit "$code" # scancel, or a preemption, after which Slurm itself requeues
  if [ "$code" = "$STOPPED" ]; then
    # Slurm's signals may reach srun's tasks without this script. A stop file that is of no signal is the user's.
    if [ "$asked" = USR1 ] || [ -e "$signalled" ] || log_says "stops after step.*received SIG"; then requeue "stopped by a signal"; fi
    exit "$code"
  fi
  requeue "failed with exit code $code"
}

main "$@"
