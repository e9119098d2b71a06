# Sourced: commands on all hosts of a run, over ssh for those of a hostfile, by srun inside a Slurm job. Needs OUTPUT_DIR.
# shellcheck shell=bash

hosts_help() {
  cat <<'TEXT'
  HOSTFILE                      lines `HOST slots=N`, as DeepSpeed's: N processes on each (default: hostfile)
  INCLUDE, EXCLUDE              of the hostfile, as DeepSpeed's --include and --exclude: worker-1@worker-2:0,2
  SSH_PORT                      (default: as ssh is configured)
  MASTER_ADDR, MASTER_PORT      where rank 0 is met (default: the first host, and a port that is free there)
  CONTAINER                     a command that Python is run by, as `apptainer exec --nv image.sif`
  PASS_ENV                      more names, or PREFIX_*, of environment variables that the hosts get. These they get anyway:
                                PATH VIRTUAL_ENV LD_LIBRARY_PATH DS_ACCELERATOR SAPIENS_SEG_CACHE CONDA_* PYTHON* PYTORCH_*
                                CUDA_* NCCL_* GLOO_* TORCH_* OMP_* MALLOC_* HF_* WANDB_* AWS_* FI_* UCX_* *_proxy *_PROXY
TEXT
}

limit='' # not the environment's
PASSED="PATH VIRTUAL_ENV LD_LIBRARY_PATH DS_ACCELERATOR SAPIENS_SEG_CACHE CONDA_* PYTHON* PYTORCH_* CUDA_* NCCL_* GLOO_* TORCH_* \
OMP_* MALLOC_* HF_* WANDB_* AWS_* FI_* UCX_* *_proxy *_PROXY OUTPUT_DIR CONTAINER"
# A connection of its own, whose end is seen.
SEEN=(-o ControlMaster=no -o ControlPath=none -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=3 -o ServerAliveCountMax=3)

in_slurm() { [ -n "${SLURM_JOB_ID:-}" ] && [ -z "${HOSTFILE:-}" ]; }

# Sets the arrays hosts and slots, `world` (the processes), `places` (HOST:SLOTS,...) and hostfile.
read_hosts() {
  hosts=() slots=() world=0 places='' hostfile=$OUTPUT_DIR/hostfile
  local host count found name
  mkdir -p "$OUTPUT_DIR"
  if in_slurm; then
    found=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    for name in $found; do echo "$name slots=$GPUS_PER_NODE"; done >"$hostfile"
    found=$(sed 's/slots=//' "$hostfile")
  else
    # DeepSpeed itself only warns that there is no hostfile, and trains on one machine.
    [ -s "${HOSTFILE:=hostfile}" ] || refuse "HOSTFILE: $HOSTFILE: no such file, or empty; write lines as: worker-1 slots=8"
    [ "$HOSTFILE" -ef "$hostfile" ] || cp "$HOSTFILE" "$hostfile" # where all hosts see it
    found=$(hosts_of "$hostfile") || exit 2
  fi
  while read -r host count; do
    hosts+=("$host") slots+=("$count")
    world=$((world + count)) places+=${places:+,}$host:$count
  done <<<"$found"
  case "${#hosts[@]} ${hosts[0]}" in
    1\ *) ;;
    *\ localhost | *\ 127.*) refuse "HOSTFILE: ${hosts[0]}: means another host on each; give the name that the others reach it by" ;;
  esac
}

# Lines HOST SLOTS, as DeepSpeed reads a hostfile.
hosts_of() {
  DS_ACCELERATOR=cpu python - "$1" "${INCLUDE:-}" "${EXCLUDE:-}" <<'PYTHON'
import logging, sys
from deepspeed.launcher import runner
logging.disable()
try:
    found = runner.parse_inclusion_exclusion(runner.fetch_hostfile(sys.argv[1]), *sys.argv[2:])
    assert found, "no host is left"
except (ValueError, AssertionError) as error:
    sys.exit(f"error: HOSTFILE, INCLUDE, EXCLUDE: {error}")
for host, slots in found.items():
    print(host, len(slots))
PYTHON
}

# Whether this script still runs: once killed it may be there for a while, waited for by nobody.
alive() {
  local state
  read -r _ _ state _ <"/proc/$$/stat" && [ "$state" != Z ]
}

# on_host I COMMAND...: run there, in this folder, until it has ended or this script has, or for `limit` seconds.
on_host() {
  local host=${hosts[$1]}
  shift
  if in_slurm; then
    ${limit:+timeout "$limit"} srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$host" --cpu-bind=none "$@"
    return
  fi
  {
    local name pattern patterns
    read -r -a patterns <<<"$PASSED ${PASS_ENV:-}"
    for name in $(compgen -e); do
      for pattern in "${patterns[@]}"; do
        # shellcheck disable=SC2053 # a pattern
        if [[ $name == $pattern ]]; then echo "export $name=${!name@Q}"; break; fi
      done
    done
    echo RUN
    trap '' PIPE
    # As long as this script lives, and nobody has taken the file away that lets it go on.
    while [ -e "${beat:-/}" ] && alive && echo; do sleep 1; done 2>/dev/null
    [ -e "${beat:-/}" ] || echo END 2>/dev/null || :
  } | ${limit:+timeout "$limit"} ssh -T "${SEEN[@]}" ${SSH_PORT:+-p "$SSH_PORT"} "$host" "cd ${PWD@Q} && exec bash launch/hold.sh ${*@Q}"
}

# As on_host, with every line that it prints under the host's name.
on_host_by_name() { on_host "$@" 2>&1 | sed -u "s|^|${hosts[$1]}: |"; }

# on_each_host COMMAND...: the words {HOST} and {SLOTS} in it are the host's. Output goes through as it is.
on_each_host() {
  local i words word
  for i in "${!hosts[@]}"; do
    words=()
    for word in "$@"; do
      case "$word" in
        "{HOST}") words+=("${hosts[i]}") ;;
        "{SLOTS}") words+=("${slots[i]}") ;;
        *) words+=("$word") ;;
      esac
    done
    on_host "$i" "${words[@]}" 2>&1 &
  done
  wait
}

# Sets MASTER_ADDR and MASTER_PORT where they are not given.
choose_master() {
  if [ -z "${MASTER_ADDR:-}" ]; then # a name that ssh or Slurm has for a host need not resolve elsewhere
    if in_slurm; then
      MASTER_ADDR=$(scontrol show node "${hosts[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    else
      MASTER_ADDR=$(ssh -G "${hosts[0]}" | sed -n 's/^hostname //p')
    fi
  fi
  if [ -z "${MASTER_PORT:-}" ]; then
    local free='import socket; s = socket.socket(); s.bind(("", 0)); print("port", s.getsockname()[1])'
    MASTER_PORT=$(on_host 0 python -c "$free" | sed -n 's/^port //p')
    [ -n "$MASTER_PORT" ] || { echo "error: host ${hosts[0]}: cannot be reached, or runs no Python; see what ssh or srun to it says" >&2; return 1; }
  fi
  export MASTER_ADDR MASTER_PORT
}

# start_ranks MODULE [ARGUMENT...]: `python -m MODULE` in every process of the run. Returns the first exit code that is not 0;
# whatever fails is named, and the rest of the run ended.
start_ranks() {
  local runner=(python -m deepspeed.launcher.runner --log_level warning --hostfile "$hostfile" --no_ssh --no_local_rank)
  runner+=(--master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" --no_python)
  if in_slurm; then
    # One that fails ends the others, which would wait for it.
    local each=(srun --kill-on-bad-exit=1 --nodes="${#hosts[@]}" --label --distribution=block)
    if [ "${LAUNCHER:-srun}" = srun ]; then
      "${each[@]}" --ntasks="$world" --ntasks-per-node="$GPUS_PER_NODE" launch/rank.sh "$@"
    else
      "${each[@]}" --ntasks="${#hosts[@]}" --ntasks-per-node=1 --cpu-bind=none \
        --cpus-per-task=$((${CPUS_PER_GPU:-1} * GPUS_PER_NODE)) launch/node_task.sh "${runner[@]}" --node_rank NODE_RANK launch/rank.sh "$@"
    fi
    return
  fi
  [ -z "${INCLUDE:-}" ] || runner+=(--include "$INCLUDE")
  [ -z "${EXCLUDE:-}" ] || runner+=(--exclude "$EXCLUDE")
  local i first=0 code=0 one processes=() ranks=() deadline=''
  [ -n "${beat:-}" ] || beat=$(mktemp) # without it the hosts end what runs there: launch/hold.sh
  for i in "${!hosts[@]}"; do
    on_host_by_name "$i" "${runner[@]}" --node_rank "$i" launch/rank.sh "$@" &
    processes[i]=$! ranks[i]="$first to $((first + slots[i] - 1))"
    first=$((first + slots[i]))
  done
  while [ "${#processes[@]}" -gt 0 ]; do
    sleep 0.3
    for i in "${!processes[@]}"; do
      if kill -0 "${processes[i]}" 2>/dev/null; then continue; fi
      wait "${processes[i]}" && one=0 || one=$?
      unset 'processes[i]'
      if [ "$one" = 0 ] || [ "$code" != 0 ]; then continue; fi
      code=$one deadline=$((SECONDS + (one == STOPPED ? 30 : 3))) # the others may end by themselves
      [ "$one" = "$STOPPED" ] || echo "error: host ${hosts[i]} (ranks ${ranks[i]}): ended with exit code $one$(meaning "$one")" >&2
    done
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then rm -f "$beat"; fi
  done
  rm -f "$beat"
  return "$code"
}

meaning() {
  case "$1" in
    255) echo ": ssh failed: cannot be reached any more, or not at all" ;;
    *) echo "; why stands above, and in $OUTPUT_DIR/ranks" ;;
  esac
}
