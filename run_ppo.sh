#!/usr/bin/env bash
# Proximal policy optimization. Every knob is an environment variable; flags at the end override everything:
#   MODEL=outputs/sft-merged REWARD_MODEL=outputs/rm OUTPUT=outputs/ppo bash run_ppo.sh --kl_coef 0.1
# REWARD_MODEL is what run_rm.sh left, an adapter on the same MODEL (which then shares it) or a merged model.
# Without MODEL it goes on from outputs/sft-merged if that is there.
set -euo pipefail
cd "$(dirname "$0")"
[ -n "${MODEL:-}" ] || [ ! -f outputs/sft-merged/config.json ] || MODEL=outputs/sft-merged EMBEDDED=yes
. ./run_common.sh

OUTPUT="${OUTPUT:-outputs/ppo}"
REWARD_MODEL="${REWARD_MODEL:-outputs/rm}"
TRAIN="${TRAIN:-examples/reward/train}"
VALIDATION="${VALIDATION:-examples/reward/validation}"

if [ -n "$EMBEDDED" ]; then
    [ -f "$MODEL/stage.json" ] || TEMPLATE="${TEMPLATE:-chatml}"
    # a small model's answers are long and garbled: short ones that come to an end are what it can learn in two minutes
    PRESET=(--lora_rank 4 --lora_alpha 8 --lora_dropout 0 --target_modules down_proj --learning_rate 8e-3
        --lr_scheduler_type linear --max_new_tokens 12 --missing_eos_penalty 1.0 --temperature 1.0 --max_steps 30
        --rollout_batch_size 128 --per_device_train_batch_size 16 --gradient_accumulation_steps 4 --num_mini_batches 2
        --num_ppo_epochs 1 --kl_coef 0.05 --lam 1.0 --vf_coef 0.5 --cliprange_value 5 --value_init zero
        --per_device_eval_batch_size 40)
else
    PRESET=(--lora_rank 8 --lora_alpha 16 --lora_dropout 0 --max_prompt_length 512 --max_new_tokens 256
        --num_train_epochs 1 --learning_rate 1e-5 --lr_scheduler_type linear --per_device_train_batch_size 4 --gradient_accumulation_steps 8
        --num_mini_batches 2 --rollout_batch_size 32 --missing_eos_penalty 1.0 --eval_strategy steps --eval_steps 20
        --save_steps 20 --gradient_checkpointing True)
fi

launch ppo_training.py \
    --model_name_or_path "$MODEL" \
    --reward_model_path "$REWARD_MODEL" \
    ${TEMPLATE:+--template_name "$TEMPLATE"} \
    --train_file_dir "$TRAIN" \
    --validation_file_dir "$VALIDATION" \
    --output_dir "$OUTPUT" \
    "${PRESET[@]}" \
    --logging_steps 1 \
    --save_total_limit 2 \
    --seed "$SEED" \
    "$@"
