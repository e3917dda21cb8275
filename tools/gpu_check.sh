#!/usr/bin/env bash
# What only a GPU can show, for a machine lent for minutes, without a network.
#
#   OUT=out tools/gpu_check.sh [PART ...]      the parts below; without any, all in this order
#   tests       tests/gpu without Transformer Engine
#   tests-te    tests/gpu with it
#   benchmark   tools/benchmark.py --quick: the targets, against the baseline and with TE
#   pairs       CoE-2(4/64) and MoE(8/64), in turns, on the same data with the same seeds
#   extra       the command in EXTRA
#
#   OUT         folder for logs, JSON and machine.txt (required)
#   PACKAGES    folder of packages that the machine lacks (`pip install --target`), put on the path
#   TE          folder with an unpacked Transformer Engine
#   BASELINE    files of the commit to compare with (`git archive 777423a | tar x -C FOLDER`)
#   DATA        folder with tokenizer.model, train.bin/.idx and valid.bin/.idx (made if it is not there)
#   SEEDS       of the pairs (default: 1 2)
#   LIMIT       seconds for each part (default: 120 to 300, see below)
#   SMALL=1     sizes for a CPU, to try the script itself (chosen where there is no GPU)
#
# Paths are absolute, or relative to the repository.
# A part that fails or takes too long ends alone; the last lines say what became of each.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." && mkdir -p "${OUT:?a folder for the results}"
OUT=$(realpath "$OUT") HERE=$PWD PYTHON=${PYTHON:-python3}
declare -A LIMITS=([tests]=120 [tests-te]=150 [benchmark]=270 [pairs]=300 [extra]=300)
PLAIN=$HERE${PACKAGES:+:$(realpath "$PACKAGES")}
export PYTHONPATH=$PLAIN OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1

if [[ -z ${SMALL:-} ]]; then # the status is 1 where there is no GPU
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'
    export SMALL=$?
fi
if ((SMALL)); then
    BENCHMARK=(--scale tiny --rounds 2 --warmup 1)
    RUN=(model.num_layers=1 model.hidden_size=64 model.kv_lora_rank=32 model.moe_ffn_hidden_size=32
        model.vocab_size=512 model.seq_length=32 train.steps=4 train.eval_interval=2
        train.eval_samples=4 train.global_batch_size=2 train.micro_batch_size=2)
    PROBLEMS=200 VOCABULARY=400
else
    BENCHMARK=(--rounds 10)
    RUN=(model.vocab_size=8192 train.steps=300 train.eval_interval=100 train.eval_samples=256
        train.micro_batch_size=64 train.deterministic=false)
    PROBLEMS=20000 VOCABULARY=8192
fi

describe() {
    git log -1 --format='commit %H' 2> /dev/null || echo "commit ${COMMIT:-unknown}"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null
    "$PYTHON" -W ignore -c "
import torch; from megatron_coe.utils.environment import machine, versions
device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
for name, value in {**machine(device), **versions()}.items(): print(name, value)"
}

tests() { "$PYTHON" -m pytest -q -rs -p no:cacheprovider tests/gpu; }

tests-te() {
    : "${TE:?a folder with Transformer Engine}"
    PYTHONPATH=$PLAIN:$(realpath "$TE") tests
}

benchmark() {
    "$PYTHON" -W ignore tools/benchmark.py --quick "${BENCHMARK[@]}" \
        ${BASELINE:+--against "$(realpath "$BASELINE")"} ${TE:+--te-path "$(realpath "$TE")"} \
        --output "$OUT/benchmark.json"
}

data() {
    DATA=$(realpath -m "${DATA:-$OUT/data}")
    [[ -f $DATA/valid.idx ]] && return
    local qa=(--qa-keys query response) name
    "$PYTHON" tools/make_corpus.py --output "$DATA" --train-size "$PROBLEMS" &&
        "$PYTHON" tools/train_tokenizer.py --input "$DATA/train.jsonl" "${qa[@]}" \
            --vocab-size "$VOCABULARY" --output "$DATA/tokenizer.model" &&
        for name in train valid; do
            "$PYTHON" tools/preprocess_data.py --input "$DATA/$name.jsonl" "${qa[@]}" --append-eod \
                --tokenizer "$DATA/tokenizer.model" --output-prefix "$DATA/$name" || return
        done
}

pairs() {
    data || return
    local seed variant
    for seed in ${SEEDS:-1 2}; do
        for variant in coe-2_4-64 moe_8-64; do
            "$PYTHON" -W ignore pretrain_coe.py --config "examples/paper/$variant.yaml" "${RUN[@]}" \
                "data.tokenizer=$DATA/tokenizer.model" "data.train=[$DATA/train]" \
                "data.valid=[$DATA/valid]" "train.seed=$seed" checkpoint.save=null \
                "log.dir=$OUT/pairs/$variant-seed-$seed" || return
        done
    done
}

extra() { bash -c "${EXTRA:?a command}"; }

declare -A OUTCOMES
run() { # a part, as a process of its own that ends at LIMIT with all it started
    local began=$SECONDS status=0
    echo "== $1"
    timeout --kill-after 10 "${LIMIT:-${LIMITS[$1]}}" "$BASH" "$HERE/tools/gpu_check.sh" \
        --part "$1" > "$OUT/$1.log" 2>&1 || status=$?
    tail -n 5 "$OUT/$1.log"
    OUTCOMES[$1]="status $status, $((SECONDS - began)) s"
}

PARTS=(tests tests-te benchmark pairs extra)
if [[ ${1:-} == --part ]]; then "$2"; exit; fi
for part in "$@"; do
    [[ " ${PARTS[*]} " == *" $part "* ]] || { echo "no part $part: ${PARTS[*]}" >&2; exit 2; }
done
if (($#)); then PARTS=("$@"); elif [[ -z ${EXTRA:-} ]]; then unset 'PARTS[-1]'; fi
describe > "$OUT/machine.txt" 2>&1
for part in "${PARTS[@]}"; do run "$part"; done
for part in "${PARTS[@]}"; do echo "$part: ${OUTCOMES[$part]}"; done | tee "$OUT/outcomes.txt"
! grep -qv 'status 0,' "$OUT/outcomes.txt"
