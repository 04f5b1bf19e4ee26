#!/usr/bin/env bash
# Continued pretraining. Every knob is an environment variable; flags at the end override everything:
#   MODEL=Qwen/Qwen2.5-0.5B OUTPUT=outputs/pt NPROC_PER_NODE=2 bash run_pt.sh --num_train_epochs 2
# Without MODEL the embedded default is built and trained from scratch.
set -euo pipefail
cd "$(dirname "$0")"
. ./run_common.sh

OUTPUT="${OUTPUT:-outputs/pt}"
TRAIN="${TRAIN:-examples/pretrain/train}"
VALIDATION="${VALIDATION:-examples/pretrain/validation}"

if [ -n "$EMBEDDED" ]; then # random weights: all of them have to learn, on short rows, at a high rate
    PRESET=(--use_peft False --block_size 256 --num_train_epochs 10 --learning_rate 2e-3 --warmup_steps 20
        --per_device_train_batch_size 8 --eval_strategy epoch)
else
    PRESET=(--use_peft True --lora_rank 8 --lora_alpha 16 --block_size 1024 --num_train_epochs 1 --learning_rate 2e-4
        --warmup_steps 0.05 --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --eval_strategy steps
        --eval_steps 50 --gradient_checkpointing True)
fi

launch pretraining.py \
    --model_name_or_path "$MODEL" \
    --train_file_dir "$TRAIN" \
    --validation_file_dir "$VALIDATION" \
    --output_dir "$OUTPUT" \
    "${PRESET[@]}" \
    --lr_scheduler_type cosine \
    --weight_decay 0.01 \
    --logging_steps 10 \
    --save_steps 500 \
    --save_total_limit 2 \
    --seed "$SEED" \
    "$@"
