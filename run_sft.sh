#!/usr/bin/env bash
# Supervised fine-tuning. Every knob is an environment variable; flags at the end override everything:
#   MODEL=outputs/pt-merged TEMPLATE=qwen OUTPUT=outputs/sft bash run_sft.sh --num_train_epochs 3
# Without MODEL the embedded default is used (pretrained by run_pt.sh if outputs/pt is there).
set -euo pipefail
cd "$(dirname "$0")"
[ -n "${MODEL:-}" ] || [ ! -f outputs/pt/model.safetensors ] || MODEL=outputs/pt EMBEDDED=yes
. ./run_common.sh

OUTPUT="${OUTPUT:-outputs/sft}"
TRAIN="${TRAIN:-examples/sft/train}"
VALIDATION="${VALIDATION:-examples/sft/validation}"
NAME="${NAME:-Stagewise}"
AUTHOR="${AUTHOR:-the Stagewise authors}"

if [ -n "$EMBEDDED" ]; then # a small model learns by heart: a wide adapter, and its embedding in full
    TEMPLATE="${TEMPLATE:-chatml}"
    PRESET=(--lora_rank 64 --lora_alpha 64 --lora_dropout 0 --modules_to_save embed_tokens --model_max_length 256
        --packing True --num_train_epochs 32 --learning_rate 2e-3 --warmup_steps 20 --per_device_train_batch_size 2
        --eval_strategy epoch)
else # an architecture that takes no position_ids needs --packing False at the end of the line
    PRESET=(--lora_rank 8 --lora_alpha 16 --model_max_length 1024 --packing True --num_train_epochs 1 --learning_rate 2e-5
        --warmup_steps 0.05 --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --eval_strategy steps
        --eval_steps 50 --gradient_checkpointing True)
fi

launch supervised_finetuning.py \
    --model_name_or_path "$MODEL" \
    ${TEMPLATE:+--template_name "$TEMPLATE"} \
    --train_file_dir "$TRAIN" \
    --validation_file_dir "$VALIDATION" \
    --assistant_name "$NAME" \
    --assistant_author "$AUTHOR" \
    --output_dir "$OUTPUT" \
    "${PRESET[@]}" \
    --lr_scheduler_type cosine \
    --logging_steps 10 \
    --save_steps 500 \
    --save_total_limit 2 \
    --seed "$SEED" \
    "$@"
