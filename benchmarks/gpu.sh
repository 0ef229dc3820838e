#!/bin/sh
# Every measurement that needs a GPU, in one command, without network: bash benchmarks/gpu.sh [OUT] [DEVICE]
#
# Within 8 minutes on one H100 or H200: ViT-B and ViT-L at 224 beside their peers, synthetic and real input (JPEG shards that it makes),
# the input pipeline, where a step's time goes. Logs and figures go to OUT (default gpu-results), the last lines of the benchmarks to
# OUT/figures.jsonl. What fails is said at the end and does not stop the others. TINY=1 is a rehearsal with small models, on any device.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:-gpu-results}
device=${2:-cuda}
python=${PYTHON:-python3}
mkdir -p "$out"
PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
PYTHONUNBUFFERED=1
export PYTHONPATH PYTHONUNBUFFERED
: > "$out/figures.jsonl"
failed=

# measure NAME SECONDS COMMAND...: within its time, its output into OUT/NAME.log, its last line of JSON into OUT/figures.jsonl
measure() {
    name=$1 limit=$2
    shift 2
    echo "$name: $*"
    began=$(date +%s)
    if timeout -k 10 "$limit" "$python" "$@" > "$out/$name.log" 2>&1; then
        grep '^{' "$out/$name.log" | tail -n 1 >> "$out/figures.jsonl"
    else
        failed="$failed $name"
        tail -n 5 "$out/$name.log"
    fi
    echo "$name took $(($(date +%s) - began)) s"
}

if [ -n "${TINY:-}" ]; then
    measure train_step 200 benchmarks/train_step.py --device "$device" --models vit_tiny --batch 4 --repeats 1 --quick \
        --shards made --images 40
    measure profile 100 benchmarks/profile.py --device "$device" --model vit_tiny --batch 4 --steps 1
else
    measure train_step_large 190 benchmarks/train_step.py --device "$device" --models vit_large --precisions best --repeats 5 \
        --shards made --images 1024 --workers "$(nproc)"
    measure train_step_base 120 benchmarks/train_step.py --device "$device" --models vit_base --precisions best --repeats 5
    measure train_step_tiny 60 benchmarks/train_step.py --device "$device" --models vit_tiny --precisions best --repeats 5 --quick
    measure profile 35 benchmarks/profile.py --device "$device" --model vit_large --batch 128
    measure input_pipeline 45 benchmarks/input_pipeline.py --quick
fi
cat "$out/figures.jsonl"
[ -z "$failed" ] || { echo "failed:$failed, see the logs in $out"; exit 1; }
