# shellcheck shell=bash
# What the batch scripts share. Settings of a site stand in site.env beside this file.

die() {
    echo "${JOB_KIND:-slurm}: error: $*" >&2
    exit 2
}

# Every script begins here: in the repository, with the site's settings and a Python that works.
prepare_job() {
    [[ -n ${SLURM_JOB_ID:-} ]] || die "runs as a batch job only: sbatch slurm/$JOB_KIND.sbatch …"
    # shellcheck source=slurm/site.env
    source slurm/site.env
    if [[ -n ${MODULES:-} ]]; then
        declare -F module > /dev/null || die "MODULES='$MODULES': there is no command 'module' here"
        # shellcheck disable=SC2086  # several modules
        module load $MODULES || die "MODULES='$MODULES': cannot be loaded"
    fi
    read -ra PREFIX <<< "${COMMAND_PREFIX:-}"  # such as: apptainer exec --nv image.sif
    read -ra SRUN_ARGS <<< "${SRUN_OPTIONS:-}" # such as: --container-image=… of pyxis
    # A container has packages of its own, which those of the host's environment must not replace.
    if in_container; then
        PYTHON=${PYTHON:-python3}
    else
        PYTHON=${PYTHON:-$([[ -x .venv/bin/python ]] && echo "$PWD/.venv/bin/python" || echo python3)}
    fi
    # Pyxis starts in the image's own folder, where relative paths of settings lead nowhere.
    if [[ ${SRUN_ARGS[*]} == *--container-image* && ${SRUN_ARGS[*]} != *--container-workdir* ]]; then
        SRUN_ARGS+=("--container-workdir=$PWD")
    fi
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    # Inside a container of srun's the batch script cannot look; the job's log will tell.
    if ((${#SRUN_ARGS[@]} == 0)); then
        "${PREFIX[@]}" "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' ||
            die "PYTHON=$PYTHON does not run here or has no torch: set it in slurm/site.env"
    fi
}

# Whether commands run in a container, by the options or the prefix that site.env has.
in_container() {
    local program=${PREFIX[0]:-}
    [[ ${SRUN_ARGS[*]} == *--container* ]] ||
        [[ ${program##*/} =~ ^(apptainer|singularity|docker|podman|enroot|shifter|sarus|ch-run)$ ]]
}

# The value of --config among the arguments, whichever way it is written.
config_of() {
    while (($#)); do
        case $1 in
            --config) echo "${2:-}"; return ;;
            --config=*) echo "${1#--config=}"; return ;;
        esac
        shift
    done
}

# GPUs of a node: what Slurm gave, or what the driver shows; 1 process where there is none.
processes_per_node() {
    local count=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    if [[ -z $count ]] && command -v nvidia-smi > /dev/null; then
        count=$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU' || true)
    fi
    count=${count:-1}
    [[ $count =~ ^[0-9]+$ ]] || die "NPROC_PER_NODE='$count': give a number of processes"
    echo $((count > 0 ? count : 1))
}

# train --config FILE … : one launcher per node, as many ranks as it has GPUs; requeued when stopped.
train() {
    local config hosts processes status=0
    config=$(config_of "$@")
    [[ -n $config ]] || die "no --config: sbatch slurm/$JOB_KIND.sbatch --config FILE [section.key=value …]"
    [[ -f $config ]] || die "--config $config: there is no such file under $PWD"
    processes=$(processes_per_node)
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    local start="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
    export PET_LOG_DIR="${LOG_DIR:-runs/slurm}/$start" # torchrun's --log-dir
    mkdir -p "$PET_LOG_DIR"
    # Jobs that share a node must not share a port.
    local endpoint="${MASTER_ADDR:-${hosts[0]}}:${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"

    echo "$JOB_KIND: job $start: $SLURM_JOB_NUM_NODES node(s) x $processes rank(s) at $endpoint," \
        "logs in $PET_LOG_DIR"
    # Slurm signals the steps; the shell only has to outlive what reaches it too.
    trap : TERM INT USR1
    # --wait: once one node has ended, for better or worse, the others have a minute to. --cpu-bind: a
    # launcher is one task, but its ranks use every core that the job has on the node.
    srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --wait=60 --cpu-bind=none \
        "${SRUN_ARGS[@]}" \
        "${PREFIX[@]}" "$PYTHON" "$PWD/slurm/launch.py" \
        --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$processes" \
        --rdzv-backend=c10d --rdzv-endpoint="$endpoint" --rdzv-id="$start" \
        --redirects=3 --tee=0:3 \
        "$PWD/pretrain_coe.py" "$@" || status=$?
    if ((status == 75)); then
        requeue
    fi
    return "$status"
}

# Back into the queue, where the same command goes on from its checkpoint; not so when somebody
# cancelled the job, and not for ever.
requeue() {
    local state restarts=${SLURM_RESTART_COUNT:-0} most=${MAX_REQUEUES:-100}
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
    if [[ $state != RUNNING ]]; then
        echo "$JOB_KIND: stopped and saved; not requeued, because the job is $state"
    elif ((restarts >= most)); then
        echo "$JOB_KIND: stopped and saved; not requeued, after $restarts times (MAX_REQUEUES)" >&2
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "$JOB_KIND: stopped and saved; requeued"
        sleep 60 # Slurm ends this script; an exit status of its own would be taken for the job's
    else
        echo "$JOB_KIND: stopped and saved; not requeued, because Slurm refuses: sbatch the same again" >&2
    fi
}
