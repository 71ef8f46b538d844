#!/usr/bin/env bash
# GPU evidence on a bare CUDA machine without internet, in calls of at most ten minutes each:
# builds in place, tests what only a GPU runs, then benches; rows are written as they come.
#
#   bench/gpu.sh                   everything that fits, what matters most first
#   bench/gpu.sh --part step       tests; the step against the plain one; the grid of heads
#   bench/gpu.sh --part train      end to end on images, sounds and texts (ViT-S, B, L)
#   bench/gpu.sh --part kernels    tests of all kernels; each against stock PyTorch
#   bench/gpu.sh --dry-run         without a GPU: builds, compiles the kernels ahead of time for
#                                  three chips, runs the GPU tests' interpreter form, times one op
#
# Rows go to $OUT where that is set, else to bench/results. Packages that the machine misses come as
# wheels in .whl; part train needs simplejpeg, soundfile, cffi and pycparser. The parts together
# take three calls; a machine that is still warm keeps its build.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
export UML_BENCH_RESULTS=${OUT:-$PWD/bench/results} PYTHONUNBUFFERED=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8   # cuBLAS is deterministic under it; the tests ask for that
budget=585  # seconds of the whole call
mkdir -p "$UML_BENCH_RESULTS"

failed=0
step() {  # step LIMIT_S NAME COMMAND...: runs it for at most so long; notes a failure, goes on
  local limit=$1 name=$2 begun=$SECONDS status=0
  shift 2
  ((limit < budget - SECONDS)) || limit=$((budget - SECONDS))
  if ((limit < 10)); then echo "== $name: left out, no time"; failed=1; return 0; fi
  echo "== $name (at most $limit s)"
  timeout --foreground --signal=INT --kill-after=10 "$limit" "$@" || status=$?
  echo "== $name: $((SECONDS - begun)) s, status $status"
  ((status == 0)) || failed=1
}

tests() { step "$1" "$2" "$python" -m pytest -q -p no:cacheprovider "${@:3}"; }

part=all cuda=ON
case "${1:-} ${2:-}" in
  "--dry-run ") part=dry cuda=AUTO budget=1800 ;;
  "--part step" | "--part train" | "--part kernels") part=$2 ;;
  " ") ;;
  *) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

if compgen -G ".whl/*.whl" > /dev/null; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
    --target /tmp/uml_fast_wheels .whl/*.whl
  export PYTHONPATH=/tmp/uml_fast_wheels${PYTHONPATH:+:$PYTHONPATH}
fi
export UML_CUDA=$cuda
step 240 build "$python" -m pip install --quiet --no-build-isolation --no-deps --editable .
((failed == 0)) || exit 1  # a GPU without the native part would be measured for nothing
step 60 doctor "$python" -m uml_fast.doctor

if [[ $part == dry ]]; then
  for arch in 80 90 100; do
    step 240 "ahead of time, sm_$arch" env -u TRITON_INTERPRET bash -c \
      "'$python' -m uml_fast.kernels.aot --arch $arch > '$UML_BENCH_RESULTS/aot_sm$arch.json'"
  done
  tests 120 "tests of the step" tests/test_gpu.py tests/training/test_gpu_step.py
  tests 600 "kernels" bench/kernels.py -k segment_mean --benchmark-columns=median,rounds
fi

if [[ $part == all || $part == step ]]; then
  # most of it compiles kernels, about a second each; later parts find them on disk
  tests 200 "tests of the step" -m gpu tests/test_gpu.py tests/training tests/grid \
    tests/distributed/test_nccl.py
  tests 160 "step" bench/step.py
  tests 230 "grid" bench/grid.py -k cuda
fi
if [[ $part == all || $part == train ]]; then
  # per size: both compile (S, B 1 to 2 minutes, L 3), then about a minute of steps
  for size in s b l; do
    step 270 "train, ViT-$size" "$python" -m bench.train --sizes "$size"
  done
fi
if [[ $part == all || $part == kernels ]]; then
  tests "$budget" "kernels" bench/kernels.py --benchmark-columns=median,rounds
fi
"$python" -m bench.plot --print || failed=1
exit $failed
