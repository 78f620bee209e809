#!/usr/bin/env bash
# Everything that needs a GPU, in one go and without a network: build, test, measure. Results go to the folder given.
#
#   bash bench/on_gpu.sh [FOLDER]      FOLDER: $OUT, else bench/results
#
# It needs torch with CUDA, triton, numpy, scikit-build-core, pybind11, cmake, ninja, pytest, hypothesis and scikit-learn.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-${OUT:-bench/results}}
mkdir -p "$out"
failed=0
try() { printf '\n=== %s (%ds)\n' "$*" "$SECONDS"; "$@" || { failed=1; echo "FAILED: $*"; }; }

device=$(python3 -c 'import torch; print(torch.cuda.get_device_name().split()[1].lower())') || exit 1
try python3 -m pip install -q --no-build-isolation --no-deps .
# Only the files with GPU tests: the others may need packages of other extras.
mapfile -t files < <(grep -lE 'mark\.gpu|"cuda"' tests/test_*.py)
try pytest -q -m gpu "${files[@]}"
try gradmix doctor
for preset in imagenet cifar100 cifar10; do
  try python3 bench/selection_throughput.py --device cuda --preset "$preset" --json "$out/selection_throughput_${preset}_$device.json"
done
exit "$failed"
