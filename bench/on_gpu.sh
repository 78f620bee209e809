#!/usr/bin/env bash
# Everything that needs a GPU, without a network, within 15 minutes of device time: build, truth, speed, training.
#
#   bash bench/on_gpu.sh [FOLDER [STAGE...]]         FOLDER: bench/results, or where $OUT is set one archive in that folder
#   LIMIT=570 bash bench/on_gpu.sh "$OUT" ...        no longer than so many seconds (default: 840)
#   DRY=1 bash bench/on_gpu.sh FOLDER                the same commands on the CPU, at tiny sizes: a look whether they run
#
# A stage is cut off at the end of its seconds, and what it had measured stays: every command writes its result file whole,
# and those that take long write it as it grows. What a stage leaves of its time goes to the last one.
#
#   build       60   the package for this GPU alone; without its CUDA part, then without its extension, if that fails
#   truth      120   the tests marked gpu, in a process per core
#   calibrate  150   every kernel against float64 and plain torch, as a user runs it
#   kernels     60   the alignment operators beside an expert's plain torch
#   selection   90   selection_throughput at four presets
#   step        60   a training step with selection
#   engine      60   the gradient engine beside other libraries
#   cifar10          the experiment of that name, with what is left; the next call goes on from there
#
# These run only if named: tune, growth, imagenet, operators, sanitize. Where a command may take ten minutes, two calls do it all:
#
#   LIMIT=570 bash bench/on_gpu.sh "$OUT" build truth calibrate kernels
#   LIMIT=300 bash bench/on_gpu.sh "$OUT" build selection step engine cifar10
#
# Stage cifar10 wants cifar-10-batches-py under DATA (default: data). What it has done lies in runs/experiments; the archive has
# its reports and finished runs, but no checkpoints.
#
# It needs torch with CUDA, triton, numpy, scikit-build-core, pybind11, cmake, ninja, pytest, hypothesis, scikit-learn and, for
# imagenet, Pillow.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-${OUT:-bench/results}}
stages=${*:2}
stages=${stages:-build truth calibrate kernels selection step engine cifar10}
limit=${LIMIT:-840}
dry=${DRY:-}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
out=$folder
log=/dev/null
failed=0
if [[ $dry ]]; then
  device=cpu name=dry
else
  device=cuda
  # "NVIDIA H100 80GB HBM3" -> h100; then its architecture, as nvcc calls it, with the instructions that only it has.
  read -r name architecture < <(python3 -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(torch.cuda.get_device_name().split()[1].lower(), f"{major}{minor}{(chr(97) if major >= 9 else str())}-real")') || exit 1
fi

pack() { :; }
if [[ -n ${OUT:-} && $folder == "$(cd "$OUT" && pwd)" ]]; then
  # Few files may come out of such a folder: one archive holds them all. It is written anew after every stage, so that
  # whatever ends this script leaves what was done.
  out=$(mktemp -d)
  log=$out/on_gpu.log
  archive=$folder/on_gpu_${name}_$(date -u +%H%M%S).tar.gz
  pack() { tar -czf "$archive.part" -C "$out" . && mv "$archive.part" "$archive"; }
  trap 'pack; rm -rf "$out"' EXIT
fi

# stage NAME SECONDS: whether it is wanted; its time begins.
stage() {
  pack
  [[ " $stages " == *" $1 "* ]] || return
  stage_end=$((SECONDS + $2 < limit ? SECONDS + $2 : limit))
}

# Run a command, for as long as its stage lasts at the most.
try() {
  printf '\n=== %s (%ds)\n' "$*" "$SECONDS" | tee -a "$log"
  if ((SECONDS >= stage_end)); then
    failed=1
    echo "FAILED: no time was left: $*" | tee -a "$log"
    return 1
  fi
  # A command that can leave its work in good order has 20 s for it.
  timeout --signal=TERM --kill-after=20 $((stage_end - SECONDS)) "$@" 2>&1 | tee -a "$log" && return
  failed=1
  if ((SECONDS >= stage_end)); then
    echo "CUT OFF at the end of its stage: $*" | tee -a "$log"
  else
    echo "FAILED: $*" | tee -a "$log"
  fi
  return 1
}
# bench SCRIPT RESULT SECONDS [ARGUMENTS...]; the arguments name sizes, of which a dry run takes the tiny ones.
bench() {
  local options=(--seconds "$3" "${@:4}")
  [[ $dry ]] && options=(--seconds 1 --quick)
  try python3 "bench/$1.py" --device "$device" "${options[@]}" --json "$out/$2_$name.json"
}
only_on_a_gpu() { [[ ! $dry ]] || { echo "$1: needs a GPU"; return 1; }; }
install() { try env "$@" python3 -m pip install -q --no-build-isolation --no-deps .; }

if stage build 60 && only_on_a_gpu build; then
  # A build without the CUDA part is worth less, but no reason to lose a visit.
  install GRADMIX_EXTENSION=1 GRADMIX_CUDA=1 CMAKE_CUDA_ARCHITECTURES="$architecture" ||
    install GRADMIX_EXTENSION=1 GRADMIX_CUDA=0 || install GRADMIX_EXTENSION=0
  try gradmix doctor
fi
if stage truth 120; then
  try python3 bench/gpu_truth.py --seconds 115 ${dry:+--quick} --json "$out/gpu_truth_$name.json"
fi
if stage calibrate 150 && only_on_a_gpu calibrate; then
  # In a cache folder of its own: the measurements that follow meet the defaults of a new user.
  cache=$(mktemp -d)
  try env GRADMIX_CACHE_DIR="$cache" gradmix calibrate --json "$out/calibration_$name.json"
  try env GRADMIX_CACHE_DIR="$cache" gradmix doctor
  rm -rf "$cache"
fi
if stage kernels 60; then
  bench alignment_kernels alignment_kernels 1
fi
if stage selection 90; then
  for preset in imagenet cifar100 cifar10 imagenet21k; do
    bench selection_throughput "selection_throughput_$preset" 8 --preset "$preset"
    [[ $dry ]] && break # the next one would do the same
  done
fi
if stage step 60; then
  for preset in resnet50 vit-b; do
    bench training_step "training_step_$preset" 15 --preset "$preset"
    [[ $dry ]] && break # the next one would do the same
  done
fi
if stage engine 60; then
  for preset in resnet18 vit-b resnet50; do
    bench gradient_engine "gradient_engine_$preset" 10 --preset "$preset"
    [[ $dry ]] && break # the next one would do the same
  done
fi
if stage tune 150 && only_on_a_gpu tune; then
  bench tune_kernels tune_kernels 1 --wide --limit 120
fi
if stage growth 400; then
  bench cost_growth cost_growth_resnet50 10 --preset resnet50
fi
if stage imagenet 400; then
  try python3 bench/imagenet_shape.py --device "$device" ${dry:+--quick} --json "$out/imagenet_shape_$name.json"
fi
if stage operators 120; then
  for operator in sketch_project class_sketch; do
    for dtype in float32 bfloat16; do
      try python3 "bench/$operator.py" --device "$device" --dtype "$dtype" --seconds 0.3 --json "$out/${operator}_${dtype}_$name.json"
    done
  done
fi
if stage sanitize 240 && only_on_a_gpu sanitize; then
  # What CUDA's own checker says of the kernels; on some virtual machines it refuses every device.
  if compute-sanitizer python3 -c 'import torch; torch.ones(1, device="cuda").sum().item()' >"$out/sanitizer.log" 2>&1; then
    for tool in memcheck racecheck synccheck; do
      try compute-sanitizer --tool "$tool" --error-exitcode 1 \
        pytest -q -m gpu -p no:cacheprovider tests/kernels/test_gpu_operators.py -k 'formula and cuda and float32'
    done
  else
    echo "compute-sanitizer does not run here: $(tail -1 "$out/sanitizer.log")"
  fi
fi
if stage cifar10 "$limit"; then
  if [[ $dry ]]; then
    try gradmix experiment digits --device cpu --output "$out/runs/experiments"
  else
    try gradmix experiment cifar10 --data-dir "${DATA:-data}" --device cuda --output runs/experiments
    tar -cf - --exclude=.checkpoints runs/experiments | tar -xf - -C "$out"
  fi
fi
exit "$failed"
