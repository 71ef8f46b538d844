#!/usr/bin/env bash
# GPU evidence in one call under ten minutes, on a bare CUDA machine without internet: builds in
# place, tests the kernels, the step and the grid on the GPU, benches them and prints the rows.
#
#   bench/gpu.sh             rows go to $OUT where that is set, else to bench/results
#   bench/gpu.sh --dry-run   without a GPU: builds, compiles the kernels ahead of time for three
#                            chips, runs the GPU tests' interpreter form and times one op
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
export UML_BENCH_RESULTS=${OUT:-$PWD/bench/results} PYTHONUNBUFFERED=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8   # cuBLAS is deterministic under it; the tests ask for that
budget=585  # seconds of the whole call; rows of the kernels are written one by one
mkdir -p "$UML_BENCH_RESULTS"

step() {  # step LIMIT_S NAME COMMAND...: runs it, says how long it took, stops at the limit
  local limit=$1 name=$2 begun=$SECONDS
  shift 2
  ((limit < budget - SECONDS)) || limit=$((budget - SECONDS > 1 ? budget - SECONDS : 1))
  echo "== $name (at most $limit s)"
  timeout --foreground "$limit" "$@" || { echo "== $name: failed (status $?)"; return 1; }
  echo "== $name: $((SECONDS - begun)) s"
}

case ${1:-} in
  --dry-run) cuda=AUTO only="segment_mean" budget=1800 ;;
  "") cuda=ON only="" ;;
  *) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

export UML_CUDA=$cuda
step 240 build "$python" -m pip install --quiet --no-build-isolation --no-deps --editable .
step 30 doctor "$python" -m uml_fast.doctor || true

if [[ $cuda == AUTO ]]; then
  for arch in 80 90 100; do
    step 240 "ahead of time, sm_$arch" env -u TRITON_INTERPRET bash -c \
      "'$python' -m uml_fast.kernels.aot --arch $arch > '$UML_BENCH_RESULTS/aot_sm$arch.json'"
  done
fi

failed=0
step 120 "tests of the step" "$python" -m pytest -q -p no:cacheprovider tests/test_gpu.py tests/training/test_gpu_step.py || failed=1
if [[ $cuda == ON ]]; then
  step 90 "step" "$python" -m pytest -q -p no:cacheprovider bench/step.py || failed=1
  step 30 "tests of the grid" "$python" -m pytest -q -p no:cacheprovider -m gpu tests/grid || failed=1
  step 120 "grid" "$python" -m pytest -q -p no:cacheprovider -m gpu bench/grid.py || failed=1
fi
step "$budget" "kernels" "$python" -m pytest -q -p no:cacheprovider bench/kernels.py \
  ${only:+-k "$only"} --benchmark-columns=median,rounds || failed=1
"$python" -m bench.plot --print
exit $failed
