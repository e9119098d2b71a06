# Sourced in the repository's root: which Python runs, and how GPUs talk to each other. Variables: VENV or CONDA_ENV, NCCL_PROFILE.
# shellcheck shell=bash

if [ -n "${VENV:-}" ]; then
  [ -x "$VENV/bin/python" ] || { echo "error: VENV: $VENV has no bin/python; name a virtual environment's folder" >&2; exit 2; }
  PATH="$VENV/bin:$PATH"
elif [ -n "${CONDA_ENV:-}" ]; then
  conda_base=$(conda info --base) || { echo "error: CONDA_ENV: there is no conda here; load its module first, or set VENV" >&2; exit 2; }
  set +u # conda's own scripts read variables that are not set
  # shellcheck source=/dev/null
  source "$conda_base/etc/profile.d/conda.sh"
  conda activate "$CONDA_ENV" || { echo "error: CONDA_ENV: conda cannot activate '$CONDA_ENV'; see conda env list" >&2; exit 2; }
  set -u
elif ! command -v deepspeed >/dev/null; then
  PATH="$PWD/.venv/bin:$PATH" # the one that `make` built
fi
export PATH

case "${NCCL_PROFILE:-}" in
  "") ;;
  infiniband) export NCCL_IB_DISABLE=0 NCCL_IB_HCA=${NCCL_IB_HCA:-mlx5} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker} ;;
  ethernet) export NCCL_IB_DISABLE=1 NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker} ;;
  debug) export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET,ENV TORCH_DISTRIBUTED_DEBUG=DETAIL ;;
  *) echo "error: NCCL_PROFILE: '$NCCL_PROFILE' is none of infiniband, ethernet, debug" >&2; exit 2 ;;
esac
