#!/usr/bin/env bash
# The staged chain on a fresh machine: PT -> merge -> SFT -> merge -> questions, RM -> PPO -> merge, DPO -> merge, and one
# table of what was learnt.
#   bash run_pipeline.sh                                  the embedded default: a tiny model, trained from scratch
#   MODEL=Qwen/Qwen2.5-0.5B bash run_pipeline.sh          the same chain on a real model (adapters, merged between stages)
#   OUTPUT_ROOT   where everything goes (outputs/pipeline)
#   PT_FLAGS, SFT_FLAGS, RM_FLAGS, PPO_FLAGS, DPO_FLAGS   more flags for a stage: SFT_FLAGS="--max_steps 100"
set -euo pipefail
cd "$(dirname "$0")"
ROOT="${OUTPUT_ROOT:-outputs/pipeline}"
[ -n "${MODEL:-}" ] || export EMBEDDED=yes
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
