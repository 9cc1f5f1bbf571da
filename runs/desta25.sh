#!/usr/bin/env bash
# The paper: Llama-3.1-8B-Instruct, Whisper-large-v3, a 6-layer Q-Former with 64 queries, 5 epochs of
# 5 million rows, 8 GPUs. The values are the recipe "paper" of recipes.py.
#
# Make the targets, then train:
#   LLM=… WHISPER=… METADATA=F.jsonl INSTRUCTIONS=DIR AUDIO_ROOT=… bash runs/desta25.sh
# Train on the published targets:
#   LLM=… WHISPER=… DATA=DeSTA-AQA5M AUDIO_ROOT=… bash runs/desta25.sh
# Several nodes: NODES=4 HEAD=node0:29500 …, the same command on each; OUT on a disk that all of them see.
# Cards of 24 GB: … bash runs/desta25.sh --shard_llm 1 --checkpoint_activations 1 (docs/scale.md: what fits).
#
# What follows the script's name goes to train.py. A stopped run continues by the same command.
set -euo pipefail
cd "$(dirname "$0")/.."
NODES=${NODES:-1} GPUS=${GPUS:-8} OUT=${OUT:-out/desta25}
run() {
    torchrun --nnodes="$NODES" --nproc_per_node="$GPUS" \
        --rdzv_backend=c10d --rdzv_endpoint="${HEAD:-localhost:29500}" "$@"
}
common=(--recipe paper --llm "$LLM" --whisper "$WHISPER" --audio_root "$AUDIO_ROOT")

if [ -z "${DATA:-}" ]; then
    DATA=$OUT/targets.jsonl
    run generate_data.py "${common[@]}" --metadata "$METADATA" --instructions "$INSTRUCTIONS" \
        --out "$DATA"
fi
SHARE=$((96 / (NODES * GPUS))) # rows of a GPU in a step: at most 12 at once, fewer on more GPUs
run train.py "${common[@]}" --data "$DATA" --eval_data "${EVAL_DATA:-}" --out "$OUT" \
    --micro_batch $((SHARE < 12 ? SHARE : 12)) "$@"
