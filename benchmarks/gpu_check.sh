#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: build, tests, memory and race checks, benchmarks.
#   benchmarks/gpu_check.sh OUT
# PYTHON (default python3) must have torch with CUDA, pytest, pybind11 and what the package needs; nvcc and cmake must be
# on PATH, compute-sanitizer beside nvcc. The results are in OUT; it goes on after a failure and ends with its code.
set -uo pipefail
if [ $# -ne 1 ]; then
  echo "usage: $0 OUT" >&2
  exit 2
fi
mkdir -p "$1"
out="$(cd "$1" && pwd)"
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
failed=""

# The log of a step goes to OUT/<name>.log, its last lines to the terminal.
step() {
  local name="$1" seconds="$SECONDS"
  shift
  if "$@" >"$out/$name.log" 2>&1; then
    echo "ok      $name, $((SECONDS - seconds)) s"
  else
    echo "FAILED  $name, $((SECONDS - seconds)) s; the end of $out/$name.log:"
    tail -n 30 "$out/$name.log"
    failed="$failed $name"
  fi
}

build() {
  local pybind11
  pybind11="$("$python" -m pybind11 --cmakedir)" || { echo "pip install pybind11"; return 1; }
  cmake -S . -B build/gpu -DBIDFMKD_CUDA=ON -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_FLAGS=-Xptxas=-v \
    -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$pybind11" &&
    cmake --build build/gpu --parallel --clean-first &&
    rm -rf build/gpu_site && mkdir -p build/gpu_site && cp -r bidfmkd_fast build/gpu_site/ &&
    rm -f build/gpu_site/bidfmkd_fast/_C*.so && cp build/gpu/_C*.so build/gpu_site/bidfmkd_fast/
}

no_spills() {
  ! grep -E '[1-9][0-9]* bytes spill' "$out/build.log"
}

sanitized() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --kernel-regex kns=bidfmkd --error-exitcode 9 \
    "$python" -m pytest -q -p no:cacheprovider python_tests/cuda/test_ops.py -k every_kernel
}

step build build
[ -n "$failed" ] && exit 1
export PYTHONPATH="$PWD/build/gpu_site"
step no_spills no_spills
step diagnostics "$python" -m bidfmkd_fast
step tests "$python" -m pytest -q -p no:cacheprovider python_tests/cuda
if command -v compute-sanitizer >/dev/null; then
  step memcheck sanitized memcheck
  step racecheck sanitized racecheck
  step initcheck sanitized initcheck
else
  echo "FAILED  there is no compute-sanitizer on PATH"
  failed="$failed sanitizer"
fi
step benchmarks "$python" benchmarks/gpu.py --out "$out"
cat "$out/diagnostics.log" "$out/benchmarks.log"
if [ -n "$failed" ]; then
  echo "failed:$failed"
  exit 1
fi
