#!/usr/bin/env bash
# What only a real GPU can show, in under 10 minutes: tests marked gpu, then the benchmarks with result files.
#
#   benchmarks/gpu_check.sh            # on the first GPU
#   DEVICE=cpu QUICK=1 benchmarks/gpu_check.sh   # dry run without a GPU: small sizes, its files are deleted
#
# Results: benchmarks/results/gpu_*.{json,md,txt}. The last lines say what failed; the exit status is their number.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
DEVICE=${DEVICE:-0}
RESULTS=benchmarks/results
mkdir -p "$RESULTS"
PREFIX=gpu
[ -n "${QUICK:-}" ] && PREFIX=dry
failed=()

run() { # run NAME SECONDS COMMAND...: output goes to results/gpu_NAME.txt, the last line to the terminal
    local name=$1 limit=$2
    shift 2
    [ "$PREFIX" = dry ] && limit=$((limit * 5))
    local start=$SECONDS
    if timeout "$limit" "$@" >"$RESULTS/${PREFIX}_$name.txt" 2>&1; then
        echo "$name: $((SECONDS - start)) s: $(tail -n 1 "$RESULTS/${PREFIX}_$name.txt")"
    else
        echo "$name: FAILED after $((SECONDS - start)) s, see $RESULTS/${PREFIX}_$name.txt"
        failed+=("$name")
    fi
}

if [ "$DEVICE" != cpu ] && ! "$PYTHON" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    echo "no CUDA device that this PyTorch can use; dry run: DEVICE=cpu QUICK=1 $0" >&2
    exit 2
fi
if [ -n "${QUICK:-}" ]; then
    tests=(tests/utils/test_device.py)
    compile=(--collect-only)
    training=(--imgsz 64 --batch-size 2 --rounds 1 --model yolov5n --variants plain)
    memory=(--side 64 --rounds 1 --skip-large)
    mixers=(--sizes 64 --rounds 1 --batch 1)
else
    tests=(tests)
    compile=()
    training=(--imgsz 640 --batch-size 16 --rounds 5 --model yolov5s)
    memory=(--rounds 2)
    mixers=(--half --rounds 3)
fi
run tests 240 "$PYTHON" -m pytest -q -m "gpu and not slow" "${tests[@]}"
run compile 90 "$PYTHON" -m pytest -q -m "gpu and slow" tests/engine/train/test_gpu.py "${compile[@]}"
run training 150 "$PYTHON" -m benchmarks.training --device "$DEVICE" --name "${PREFIX}_training" "${training[@]}"
run revvit_memory 60 "$PYTHON" -m benchmarks.revvit_memory --device "$DEVICE" --name "${PREFIX}_revvit_memory" "${memory[@]}"
run nextvit_mixers 50 "$PYTHON" -m benchmarks.nextvit_mixers --device "$DEVICE" --name "${PREFIX}_nextvit_mixers" "${mixers[@]}"
if [ "$PREFIX" = dry ] && [ "${#failed[@]}" = 0 ]; then rm -f "$RESULTS"/dry_*; fi
if [ "${#failed[@]}" -gt 0 ]; then echo "failed: ${failed[*]}"; fi
exit "${#failed[@]}"
