#!/usr/bin/env bash
# Direct preference optimization. Every knob is an environment variable; flags at the end override everything:
#   MODEL=outputs/sft-merged OUTPUT=outputs/dpo bash run_dpo.sh --beta 0.2
# Without MODEL it goes on from outputs/sft-merged if that is there.
set -euo pipefail
cd "$(dirname "$0")"
[ -n "${MODEL:-}" ] || [ ! -f outputs/sft-merged/config.json ] || MODEL=outputs/sft-merged EMBEDDED=yes
. ./run_common.sh

OUTPUT="${OUTPUT:-outputs/dpo}"
TRAIN="${TRAIN:-examples/reward/train}"
VALIDATION="${VALIDATION:-examples/reward/validation}"

if [ -n "$EMBEDDED" ]; then
    [ -f "$MODEL/stage.json" ] || TEMPLATE="${TEMPLATE:-chatml}"
    PRESET=(--lora_rank 16 --lora_alpha 32 --lora_dropout 0 --max_length 256 --num_train_epochs 2 --learning_rate 5e-4 --warmup_steps 5
        --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --eval_strategy epoch)
else
    PRESET=(--lora_rank 8 --lora_alpha 16 --max_length 1024 --max_prompt_length 512 --num_train_epochs 1
        --learning_rate 5e-6 --warmup_steps 0.05 --per_device_train_batch_size 4 --gradient_accumulation_steps 4
        --eval_strategy steps --eval_steps 50 --gradient_checkpointing True)
fi

launch dpo_training.py \
    --model_name_or_path "$MODEL" \
    ${TEMPLATE:+--template_name "$TEMPLATE"} \
    --train_file_dir "$TRAIN" \
    --validation_file_dir "$VALIDATION" \
    --output_dir "$OUTPUT" \
    "${PRESET[@]}" \
    --lr_scheduler_type cosine \
    --logging_steps 10 \
    --save_steps 500 \
    --save_total_limit 2 \
    --seed "$SEED" \
    "$@"
