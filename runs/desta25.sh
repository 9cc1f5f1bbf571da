#!/usr/bin/env bash
# The paper's recipe: Llama-3.1-8B-Instruct, Whisper-large-v3, a 6-layer Q-Former with 64 queries, 5 epochs of 5 million rows on 8 GPUs.
#
#   LLM=… WHISPER=… DATA=… AUDIO_ROOT=… bash runs/desta25.sh
#   several nodes: NODES=4 HEAD=node0:29500 bash runs/desta25.sh      the same command on each; OUT on a disk that all of them see
#   cards of 24 GB: … bash runs/desta25.sh --shard_llm 1 --checkpoint_activations 1      python runs/memory.py says what fits where
#   the paper's comparison with LoRA: … bash runs/desta25.sh --lora_rank 16
#
# DATA: the folder of DeSTA-AQA5M's JSONL files, or some of them with commas between. A stopped run continues by the same command.
# Global batch 96 = 12 rows x 8 GPUs; more GPUs take fewer rows each, fewer GPUs accumulate.
set -euo pipefail
cd "$(dirname "$0")/.."
NODES=${NODES:-1} HEAD=${HEAD:-localhost:29500} GPUS=${GPUS:-8}
SHARE=$((96 / (NODES * GPUS)))
MICRO=${MICRO:-$((SHARE < 12 ? SHARE : 12))}
torchrun --nnodes="$NODES" --nproc_per_node="$GPUS" --rdzv_backend=c10d --rdzv_endpoint="$HEAD" train.py \
    --llm "$LLM" --whisper "$WHISPER" --data "$DATA" --eval_data '' --audio_root "$AUDIO_ROOT" --out "${OUT:-out/desta25}" \
    --n_layers 6 --n_queries 64 --audio_seconds 30 --dropout 0.1 --standardize 0 \
    --lr 1e-4 --warmup 2000 --epochs 5 --global_batch 96 --micro_batch "$MICRO" --length_pool 32 --save_every 1000 "$@"
