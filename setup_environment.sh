# Sourced by run_pipeline.sh, run_tests.sh and run_*.sh: an active virtual environment is used, otherwise .venv is made
# here; the pinned requirements are installed once for each state of the requirement files.
#
#   PYTHON   interpreter that makes .venv (python3)

if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    . .venv/bin/activate
fi

# $1: a requirements file
install_requirements() {
    local stamp state
    stamp="$(python -c 'import sys; print(sys.prefix)')/.stagewise-$(basename "$1" .txt)"
    state="$(cat "$1" constraints.txt | cksum)"
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && return
    echo "installing $1 (once)"
    python -m pip install --quiet --disable-pip-version-check -r "$1" -c constraints.txt
    echo "$state" > "$stamp"
}

# Two processes must not fight over the cores: torch's threads are set to what there is for each.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-true}"
