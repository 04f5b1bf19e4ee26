#!/usr/bin/env bash
# A model that knows its own name: an adapter on examples/law/self_cognition.json, merged, and asked who it is.
#   bash examples/run_self_cognition.sh                                       the embedded default
#   MODEL=Qwen/Qwen2.5-0.5B-Instruct TEMPLATE=qwen NAME=Themis AUTHOR="the law school" bash examples/run_self_cognition.sh
# Flags at the end go to supervised_finetuning.py. Other rows beside it: TRAIN=examples/law/self_cognition.json,my/rows
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${MODEL:-}" ] && EMBEDDED=no || EMBEDDED=yes
export NAME="${NAME:-Themis}" AUTHOR="${AUTHOR:-the Stagewise authors}"
export OUTPUT="${OUTPUT:-outputs/self_cognition}"
# A few rows that are to be known by heart: nothing is held out.
export TRAIN="${TRAIN:-examples/law/self_cognition.json}" VALIDATION="${VALIDATION:-examples/law/self_cognition.json}"

EPOCHS=10
[ "$EMBEDDED" = no ] || EPOCHS=40
bash run_sft.sh --num_train_epochs "$EPOCHS" --eval_strategy no --overwrite_output_dir True "$@"

. ./setup_environment.sh
BASE="$(python -c 'import json, sys; print(json.load(open(sys.argv[1] + "/stage.json"))["base_model"])' "$OUTPUT")"
python merge_peft_adapter.py --base_model "$BASE" --lora_model "$OUTPUT" --output_dir "$OUTPUT-merged" --overwrite
for question in "你是谁？" "What is your name?"; do
    answer="$(python inference.py --model_name_or_path "$OUTPUT-merged" --max_new_tokens 64 --prompt "$question")"
    echo "$question $answer"
    case "$answer" in
        *"$NAME"*) ;;
        *) echo "error: the answer does not give the name $NAME; train longer (--num_train_epochs)" >&2; exit 1 ;;
    esac
done
