#!/usr/bin/env bash
# The figures of docs/benchmarks.md on this machine's first GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
usage: [NAME=value ...] benchmarks/gpu.sh [OUT]

Measures one experiment after the other with train.benchmark, on faces that it draws, and single parts of a step with
benchmarks.optimisations; the tables come last, from the files in OUT (default outputs/gpu; seen from the repository), which must not
exist. What does not fit is said, and passed over; where the plain peer does not, ours is measured alone. About 20 minutes on an
H100, by estimate.

  RUNS      lines of `recipe recompute micro_batch_size ds_config compare [key=value ...]`, instead of those below; compare: yes or no
  STEPS     measured in each, in rounds of 5 (default 20); single parts a quarter as often
  SIZE      height,width (default 1024,768)
TEXT
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
out=${1:-outputs/gpu}
[[ ${STEPS:=20} =~ ^[1-9][0-9]*$ ]] || { echo "error: STEPS=$STEPS: give a number, from 1 up" >&2; exit 1; }
[[ ${SIZE:=1024,768} =~ ^[1-9][0-9]*,[1-9][0-9]*$ ]] || { echo "error: SIZE=$SIZE: give height,width" >&2; exit 1; }
python=python
[ -x .venv/bin/python ] && python=.venv/bin/python
if [[ ${RUNS:-} != *[![:space:]]* ]]; then
  $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "error: no GPU is seen; name what is small enough for a CPU by RUNS" >&2; exit 1; }
  RUNS="face_0.3b none 8 zero1 yes
face_0.3b none 8 zero1 yes compile=true
face_0.3b none 8 zero1 no compile=true augment.on_device=true
face_0.3b head 12 zero1 no
face_0.3b blocks 12 zero1 no
face_0.6b none 4 zero1 no
face_1b none 2 zero1 yes
face_1b none 2 zero1 no compile=true
face_1b head 4 zero1 no
face_1b blocks 5 zero1 yes
face_2b blocks 4 zero2 no
sapiens2_29_0.1b none 16 zero1 no
sapiens2_29_0.4b none 8 zero1 no
sapiens2_29_0.8b head 4 zero1 no
sapiens2_29_1b head 3 zero1 no
sapiens2_29_5b blocks 2 zero2_offload no"
fi
while read -r recipe _ _ zero compare _; do
  [[ $recipe$zero != */* ]] || { echo "error: RUNS: $recipe $zero: give names, of train/configs and of ds_configs" >&2; exit 1; }
  [[ -z $recipe || $compare =~ ^(yes|no)$ ]] || { echo "error: RUNS: $recipe: compare is '$compare': give yes or no" >&2; exit 1; }
done <<<"$RUNS"

[ -e "$out" ] && { echo "error: $out exists; remove it, or name another folder" >&2; exit 1; }
mkdir -p "$out"
number=0
while read -r recipe recompute batch zero compare more; do
  [ -n "$recipe" ] || continue
  number=$((number + 1))
  name=$(printf %02d $number)_${recipe}_${recompute}_${batch}_$zero
  read -ra options <<<"$more"
  for peer in $([ "$compare" != yes ] || echo plain) none; do
    echo "== $name${more:+ $more}, peer: $peer"
    # A step of one micro batch is what is measured.
    if $python -m train.benchmark --config "train/configs/$recipe.yaml" --synthetic-data --steps "$STEPS" \
      --json "$out/$name.json" $([ $peer = none ] || echo --compare plain) "${options[@]}" "deepspeed=ds_configs/$zero.json" \
      "model.recompute=$recompute" "model.image_size=[$SIZE]" "micro_batch_size=$batch" "global_batch_size=$batch" \
      </dev/null >"$out/$name.txt" 2>&1; then
      tail -n 15 "$out/$name.txt"
      break
    fi
    echo "not measured: $(grep '^error:' "$out/$name.txt" || tail -n 1 "$out/$name.txt")"
  done
done <<<"$RUNS"
$python -m benchmarks.optimisations --size "${SIZE%,*}" "${SIZE#*,}" --rounds $(((STEPS + 3) / 4)) >"$out/optimisations.md" 2>"$out/optimisations.txt" ||
  echo "not measured: $(tail -n 1 "$out/optimisations.txt")"
cat "$out/optimisations.md"
$python -m benchmarks.gpu_table "$out"
