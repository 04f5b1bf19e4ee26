#!/usr/bin/env bash
# Reward modeling. Every knob is an environment variable; flags at the end override everything:
#   MODEL=outputs/sft-merged OUTPUT=outputs/rm bash run_rm.sh --num_train_epochs 2
# The chat template is the one that the model was fine-tuned with (its stage.json), unless TEMPLATE names one.
# Without MODEL the embedded default is used (fine-tuned, if outputs/sft-merged is there).
set -euo pipefail
cd "$(dirname "$0")"
[ -n "${MODEL:-}" ] || [ ! -f outputs/sft-merged/config.json ] || MODEL=outputs/sft-merged EMBEDDED=yes
. ./run_common.sh

OUTPUT="${OUTPUT:-outputs/rm}"
TRAIN="${TRAIN:-examples/reward/train}"
VALIDATION="${VALIDATION:-examples/reward/validation}"

if [ -n "$EMBEDDED" ]; then # a small model on few pairs: a high rate; centred scores depend less on the question
    [ -f "$MODEL/stage.json" ] || TEMPLATE="${TEMPLATE:-chatml}"
    PRESET=(--lora_rank 8 --lora_alpha 16 --lora_dropout 0 --max_length 256 --num_train_epochs 2 --learning_rate 1e-3
        --warmup_steps 5 --per_device_train_batch_size 8 --eval_strategy epoch --center_rewards_coefficient 0.3)
else
    PRESET=(--lora_rank 8 --lora_alpha 16 --max_length 1024 --num_train_epochs 1 --learning_rate 2e-5
        --warmup_steps 0.05 --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --eval_strategy steps
        --eval_steps 50 --gradient_checkpointing True --center_rewards_coefficient 0.01)
fi

launch reward_modeling.py \
    --model_name_or_path "$MODEL" \
    ${TEMPLATE:+--template_name "$TEMPLATE"} \
    --train_file_dir "$TRAIN" \
    --validation_file_dir "$VALIDATION" \
    --output_dir "$OUTPUT" \
    "${PRESET[@]}" \
    --lr_scheduler_type cosine \
    --logging_steps 5 \
    --save_steps 500 \
    --save_total_limit 2 \
    --seed "$SEED" \
    "$@"
