#!/usr/bin/env bash
# Everything that needs a GPU, in one go and without a network: build, test, measure. Results go to the folder given.
#
#   bash bench/on_gpu.sh [FOLDER [STEP...]]      FOLDER: $OUT, else bench/results
#   STEP: build, test, operators, engine, selection, sanitize (default: all, in this order)
#
# It needs torch with CUDA, triton, numpy, scikit-build-core, pybind11, cmake, ninja, pytest, hypothesis and scikit-learn.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-${OUT:-bench/results}}
steps=${*:2}
mkdir -p "$out"
failed=0
try() { printf '\n=== %s (%ds)\n' "$*" "$SECONDS"; "$@" || { failed=1; echo "FAILED: $*"; }; }
wanted() { [[ " ${steps:-build test operators engine selection sanitize} " == *" $1 "* ]]; }

device=$(python3 -c 'import torch; print(torch.cuda.get_device_name().split()[1].lower())') || exit 1
if wanted build; then
  # A build without the CUDA part would be an error here, not a reason to fall back on torch.
  GRADMIX_EXTENSION=1 GRADMIX_CUDA=1 try python3 -m pip install -q --no-build-isolation --no-deps .
fi
if wanted test; then
  # Only the files with GPU tests: the others may need packages of other extras.
  mapfile -t files < <(grep -lE 'mark\.gpu|"cuda"' tests/test_*.py)
  try pytest -q -m gpu "${files[@]}"
  try gradmix doctor
fi
if wanted operators; then
  for operator in sketch_project class_sketch; do
    for dtype in float32 bfloat16; do
      try python3 "bench/$operator.py" --device cuda --dtype "$dtype" --json "$out/${operator}_${dtype}_$device.json"
    done
  done
fi
if wanted engine; then
  for preset in resnet18 resnet50 vit-b; do
    try python3 bench/gradient_engine.py --device cuda --preset "$preset" --json "$out/gradient_engine_${preset}_$device.json"
  done
fi
if wanted selection; then
  for preset in imagenet cifar100 cifar10; do
    try python3 bench/selection_throughput.py --device cuda --preset "$preset" --json "$out/selection_throughput_${preset}_$device.json"
  done
fi
if wanted sanitize; then
  # What CUDA's own checker says of the kernels; on some virtual machines it refuses every device.
  if compute-sanitizer python3 -c 'import torch; torch.ones(1, device="cuda").sum().item()' >"$out/sanitizer.log" 2>&1; then
    for tool in memcheck racecheck synccheck; do
      try timeout 200 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        pytest -q -m gpu -p no:cacheprovider tests/test_gpu_operators.py -k 'formula and cuda and float32'
    done
  else
    echo "compute-sanitizer does not run here: $(tail -1 "$out/sanitizer.log")"
  fi
fi
exit "$failed"
