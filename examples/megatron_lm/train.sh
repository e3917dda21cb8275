#!/usr/bin/env bash
# Train the paper's CoE-2(4/64) with a Megatron-LM checkout: its pretrain, its arguments, its data.
#
#   MEGATRON_LM_PATH=path/to/Megatron-LM DATA=my/corpus_text_document TOKENIZER=my/tokenizer.model \
#       examples/megatron_lm/train.sh [more of Megatron-LM's arguments]
#
# DATA is a prefix that Megatron-LM's tools/preprocess_data.py (or this repository's, with packed
# documents) has written; without it the data are random tokens. GPUS is the number of processes of
# this machine. Without Transformer Engine add: --transformer-impl local --no-persist-layer-norm
# --no-masked-softmax-fusion --no-gradient-accumulation-fusion.
set -euo pipefail

: "${MEGATRON_LM_PATH:?name a Megatron-LM checkout, of the 0.16 line or from 0.18 on}"
cd "$(dirname "$0")/../.."

CHAIN=(
    --coe-iterations 2
    --coe-residual inner
)
MODEL=(
    --num-layers 4
    --hidden-size 1024
    --num-attention-heads 8
    --multi-latent-attention
    --kv-lora-rank 512
    --qk-head-dim 128
    --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --qk-layernorm # the norm of the latents; queries have none
    --position-embedding-type rope
    --rope-type yarn
    --rotary-scaling-factor 40
    --mscale 0.707
    --mscale-all-dim 0.707
    --normalization RMSNorm
    --norm-epsilon 1e-6
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --hidden-dropout 0
    --attention-dropout 0
    --init-method-std 0.02
)
EXPERTS=(
    --num-experts 63
    --moe-router-topk 4
    --moe-ffn-hidden-size 704
    --ffn-hidden-size 704
    --moe-shared-expert-intermediate-size 704
    --moe-grouped-gemm
    --moe-token-dispatcher-type alltoall
    --moe-router-pre-softmax
    --moe-router-dtype fp32
    --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 1e-3
)
RECIPE=(
    --seq-length 512
    --max-position-embeddings 512
    --micro-batch-size 8
    --global-batch-size 64
    --train-iters 1000
    --lr 3e-4
    --lr-decay-style constant
    --lr-warmup-fraction 0.1
    --adam-beta2 0.95
    --weight-decay 0.01
    --clip-grad 1.0
    --bf16
    --seed 42
    --use-distributed-optimizer
    --eval-interval 100
    --eval-iters 5
    --log-interval 10
)
OUTPUT=(
    --save "${SAVE:-runs/megatron_lm}"
    --load "${SAVE:-runs/megatron_lm}"
    --save-interval 500
    --ckpt-format torch_dist
    --tensorboard-dir "${SAVE:-runs/megatron_lm}/tensorboard"
)
if [[ -n "${DATA:-}" ]]; then
    : "${TOKENIZER:?name the SentencePiece model that DATA was encoded with}"
    CORPUS=(
        --data-path "$DATA"
        --split 98,2,0
        --tokenizer-type SentencePieceTokenizer
        --tokenizer-model "$TOKENIZER"
    )
else
    CORPUS=(--mock-data --tokenizer-type NullTokenizer --vocab-size 102399)
fi

export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTHONPATH="$MEGATRON_LM_PATH:$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec torchrun --nproc-per-node "${GPUS:-1}" examples/megatron_lm/pretrain_coe_megatron.py \
    "${CHAIN[@]}" "${MODEL[@]}" "${EXPERTS[@]}" "${RECIPE[@]}" "${OUTPUT[@]}" "${CORPUS[@]}" "$@"
