#!/usr/bin/env bash
# Everything that needs a GPU, without a network: build, test, measure. Results go to the folder given.
#
#   bash bench/on_gpu.sh [FOLDER [STEP...]]      FOLDER: bench/results, or where $OUT is set one archive in that folder
#   STEP: build, test, calibrate, kernels, selection, step, tune, cifar10, growth, imagenet, operators, engine, sanitize (default:
#   all, in this order of worth)
#   LIMIT=570 bash bench/on_gpu.sh ...           no longer than so many seconds; what is not done by then is cut off
#
# Where a machine is had for ten minutes at a time, these fit (estimates in seconds, on an H100; not all measured):
#
#   LIMIT=570 bash bench/on_gpu.sh "$OUT" build test calibrate     90 + 180 + 180
#   LIMIT=570 bash bench/on_gpu.sh "$OUT" build kernels            90 + 240
#   LIMIT=570 bash bench/on_gpu.sh "$OUT" build selection          90 + 420
#   LIMIT=570 bash bench/on_gpu.sh "$OUT" build step tune          90 + 240 + 180
#   LIMIT=570 bash bench/on_gpu.sh "$OUT" build cifar10            90 + 1500, in as many visits as it takes
#   LIMIT=570 bash bench/on_gpu.sh "$OUT" build growth             90 + 400
#   LIMIT=570 bash bench/on_gpu.sh "$OUT" build imagenet           90 + 400
#
# Step cifar10 wants cifar-10-batches-py under DATA (default: data). What it has done lies in runs/experiments, from which
# the next call goes on; the archive has its reports and finished runs, but no checkpoints.
#
# It needs torch with CUDA, triton, numpy, scikit-build-core, pybind11, cmake, ninja, pytest, hypothesis, scikit-learn and, for
# imagenet, Pillow.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-${OUT:-bench/results}}
steps=${*:2}
limit=${LIMIT:-0}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
out=$folder
device=$(python3 -c 'import torch; print(torch.cuda.get_device_name().split()[1].lower())') || exit 1
log=/dev/null
failed=0

if [[ -n ${OUT:-} && $folder == "$(cd "$OUT" && pwd)" ]]; then
  # Few files may come out of such a folder: one archive holds them all, whatever happens on the way.
  out=$(mktemp -d)
  log=$out/on_gpu.log
  pack() { tar -czf "$folder/on_gpu_${device}_$(date -u +%H%M%S).tar.gz" -C "$out" . && rm -rf "$out"; }
  trap pack EXIT
fi

# Run a command, for as long as is left at the most.
try() {
  printf '\n=== %s (%ds)\n' "$*" "$SECONDS" | tee -a "$log"
  local within=()
  if ((limit)); then
    if ((SECONDS >= limit)); then
      failed=1
      echo "FAILED: no time was left: $*"
      return
    fi
    # A command that can leave its work in good order has half a minute for it.
    within=(timeout --signal=TERM --kill-after=30 $((limit - SECONDS)))
  fi
  "${within[@]}" "$@" 2>&1 | tee -a "$log" || { failed=1; echo "FAILED: $*" | tee -a "$log"; }
}
wanted() { [[ " ${steps:-build test calibrate kernels selection step tune cifar10 growth imagenet operators engine sanitize} " == *" $1 "* ]]; }

if wanted build; then
  # A build without the CUDA part would be an error here, not a reason to fall back on torch.
  export GRADMIX_EXTENSION=1 GRADMIX_CUDA=1
  try python3 -m pip install -q --no-build-isolation --no-deps .
fi
if wanted test; then
  # Only the files with GPU tests: the others may need packages of other extras.
  mapfile -t files < <(grep -lE 'mark\.gpu|"cuda"' tests/*/test_*.py)
  try pytest -q -m gpu "${files[@]}"
  try gradmix doctor
fi
if wanted calibrate; then
  # In a cache folder of its own: the measurements that follow meet the defaults of a new user.
  cache=$(mktemp -d)
  GRADMIX_CACHE_DIR=$cache try gradmix calibrate --json "$out/calibration_$device.json"
  GRADMIX_CACHE_DIR=$cache try gradmix doctor
  rm -rf "$cache"
fi
if wanted kernels; then
  try python3 bench/alignment_kernels.py --device cuda --seconds 2 --json "$out/alignment_kernels_$device.json"
fi
if wanted selection; then
  for preset in imagenet imagenet-vit imagenet21k cifar100 tiny-imagenet cifar10; do
    try python3 bench/selection_throughput.py --device cuda --preset "$preset" --seconds 20 \
      --json "$out/selection_throughput_${preset}_$device.json"
  done
fi
if wanted step; then
  for preset in resnet50 vit-b; do
    try python3 bench/training_step.py --device cuda --preset "$preset" --seconds 50 \
      --json "$out/training_step_${preset}_$device.json"
  done
fi
if wanted tune; then
  try python3 bench/tune_kernels.py --device cuda --wide --limit 120 --seconds 1 --json "$out/tune_kernels_$device.json"
fi
if wanted cifar10; then
  try gradmix experiment cifar10 --data-dir "${DATA:-data}" --device cuda --output runs/experiments
  tar -cf - --exclude=.checkpoints runs/experiments | tar -xf - -C "$out"
fi
if wanted growth; then
  try python3 bench/cost_growth.py --device cuda --preset resnet50 --seconds 10 --json "$out/cost_growth_resnet50_$device.json"
fi
if wanted imagenet; then
  try python3 bench/imagenet_shape.py --device cuda --json "$out/imagenet_shape_$device.json"
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
if wanted sanitize; then
  # What CUDA's own checker says of the kernels; on some virtual machines it refuses every device.
  if compute-sanitizer python3 -c 'import torch; torch.ones(1, device="cuda").sum().item()' >"$out/sanitizer.log" 2>&1; then
    for tool in memcheck racecheck synccheck; do
      try timeout 200 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        pytest -q -m gpu -p no:cacheprovider tests/kernels/test_gpu_operators.py -k 'formula and cuda and float32'
    done
  else
    echo "compute-sanitizer does not run here: $(tail -1 "$out/sanitizer.log")"
  fi
fi
exit "$failed"
