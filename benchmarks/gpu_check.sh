#!/usr/bin/env bash
# Run everything that needs a GPU in under ten minutes: build, benchmarks, tests, memory and race checks.
#   benchmarks/gpu_check.sh OUT
# PYTHON (default python3) must have torch with CUDA, pytest, pybind11 and the package's dependencies;
# nvcc, cmake and compute-sanitizer must be on PATH. OUT gets the results as JSON and the log of every
# step. The most important steps come first. After a failure the other steps still run, and the exit
# code is 1.
set -uo pipefail
if [ $# -ne 1 ]; then
  echo "usage: $0 OUT" >&2
  exit 2
fi
mkdir -p "$1"
out="$(cd "$1" && pwd)"
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
step_log="$out/step.log" # the log of the step at work; a run that is cut off leaves it
failed=""
: >"$out/gpu_check.log"

# step NAME COMMAND: run COMMAND, keep its log, and show the last lines if it fails.
step() {
  local name="$1" start="$SECONDS" verdict=ok
  shift
  "$@" >"$step_log" 2>&1 || verdict=FAILED
  echo "$verdict  $name, $((SECONDS - start)) s"
  { echo "== $name: $verdict"; cat "$step_log"; } >>"$out/gpu_check.log"
  if [ "$verdict" = FAILED ]; then
    tail -n 30 "$step_log"
    failed="$failed $name"
  fi
}

build() {
  local pybind11
  pybind11="$("$python" -m pybind11 --cmakedir)" || { echo "pip install pybind11"; return 1; }
  cmake -S . -B build/gpu -DBIDFMKD_CUDA=ON -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_FLAGS=-Xptxas=-v \
    -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$pybind11" &&
    timeout 180 cmake --build build/gpu --parallel --clean-first &&
    rm -rf build/gpu_site && mkdir -p build/gpu_site && cp -r bidfmkd_fast build/gpu_site/ &&
    rm -f build/gpu_site/bidfmkd_fast/_C*.so && cp build/gpu/_C*.so build/gpu_site/bidfmkd_fast/
}

no_spills() {
  grep "bytes spill" "$out/gpu_check.log" && ! grep -E '[1-9][0-9]* bytes spill' "$out/gpu_check.log"
}

diagnostics() {
  "$python" -m bidfmkd_fast && "$python" -c "
from bidfmkd_fast.ops import backend
import torch
problem = backend.load_error or backend.device_problem(torch.device('cuda', 0))
raise SystemExit(problem and str(problem))"
}

# Check only the project's own kernels, which are in the namespace bidfmkd.
sanitized() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 90 compute-sanitizer --tool "$@" --kernel-name kns=bidfmkd --error-exitcode 9 \
    "$python" -m pytest -q -p no:cacheprovider python_tests/cuda/test_ops.py -k every_kernel
}

step build build
[ -n "$failed" ] && exit 1
# Use the package that was built. By default Python would put the source tree before it.
export PYTHONPATH="$PWD/build/gpu_site" PYTHONSAFEPATH=1
step no_spills no_spills
step diagnostics diagnostics
cat "$step_log"
step benchmarks timeout 240 "$python" benchmarks/gpu.py --out "$out"
cat "$step_log"
if command -v compute-sanitizer >/dev/null; then
  step memcheck sanitized memcheck --report-api-errors no
  step racecheck sanitized racecheck
else
  echo "FAILED  there is no compute-sanitizer on PATH"
  failed="$failed sanitizer"
fi
step tests timeout "$((SECONDS < 500 ? 570 - SECONDS : 70))" "$python" -m pytest -q -p no:cacheprovider python_tests/cuda
rm -f "$step_log"
if [ -n "$failed" ]; then
  echo "failed:$failed"
  exit 1
fi
