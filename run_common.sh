# Sourced by run_*.sh: the environment, the embedded default model, and the launcher.
#
#   MODEL            folder or hub name; unset: the embedded default, built into outputs/tiny-model
#   SEED             (42)
#   NPROC_PER_NODE   processes on this machine (1: plain python, more: torchrun)
#   NNODES           machines (1); with more, start the same script on each with its NODE_RANK
#   NODE_RANK        (0)   MASTER_ADDR (127.0.0.1)   MASTER_PORT (29500)
#   DEEPSPEED        a DeepSpeed configuration (.json), passed as --deepspeed
#   PYTORCH_ALLOC_CONF  (expandable_segments:True with MODEL on an NVIDIA GPU)
#   MAX_RESTARTS     (0) how often torchrun starts all processes again after one died; they go on from the newest
#                    checkpoint, so pass --save_steps

. ./setup_environment.sh
install_requirements requirements.txt

SEED="${SEED:-42}"
NPROC_PER_NODE="${NPROC_PER_NODE:-1}"
NNODES="${NNODES:-1}"
MAX_RESTARTS="${MAX_RESTARTS:-0}"
EMBEDDED="${EMBEDDED:-}"
if [ -z "${MODEL:-}" ]; then
    MODEL=outputs/tiny-model
    EMBEDDED=yes
    [ -f "$MODEL/config.json" ] || python examples/build_tiny_model.py --output_dir "$MODEL"
fi
# a real model on a GPU: the allocator's segments grow, which leaves fewer gaps; settings of yours stay
if [ -z "$EMBEDDED" ] && [ -z "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" ] && nvidia-smi -L > /dev/null 2>&1; then
    export PYTORCH_ALLOC_CONF=expandable_segments:True
fi

# launch SCRIPT FLAGS...: plain python for one process, torchrun for several or where one is to be started again
launch() {
    local script="$1"
    shift
    if [ "$NPROC_PER_NODE" = 1 ] && [ "$NNODES" = 1 ] && [ "$MAX_RESTARTS" = 0 ]; then
        python "$script" "$@" ${DEEPSPEED:+--deepspeed "$DEEPSPEED"}
        return
    fi
    # each process gets its share of the cores
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( $(getconf _NPROCESSORS_ONLN) / NPROC_PER_NODE > 0 ? $(getconf _NPROCESSORS_ONLN) / NPROC_PER_NODE : 1 ))}"
    torchrun --nproc_per_node "$NPROC_PER_NODE" --nnodes "$NNODES" --node_rank "${NODE_RANK:-0}" \
        --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" \
        --max_restarts "$MAX_RESTARTS" \
        "$script" "$@" ${DEEPSPEED:+--deepspeed "$DEEPSPEED"}
}
