#!/usr/bin/env bash
# Train the paper's CoE-2(4/64) with Megatron's own pretrain, arguments and data sets.
#
#   DATA=my/corpus TOKENIZER=my/tokenizer.model GPUS=8 examples/megatron_lm/train.sh [arguments]
#
# What is added on the command line wins. Without DATA the data are random tokens.
#   DATA              prefix of the .bin/.idx pair that coe preprocess has written
#   VALID             likewise of the validation set; without it, 2% of DATA
#   TOKENIZER         the SentencePiece model that they were encoded with
#   GPUS              processes on this machine (1)
#   SAVE              folder of checkpoints and TensorBoard files (runs/megatron_lm)
#   DEVICE=cpu        gloo, fp32 and this package's own modules in place of NCCL, bf16 and
#                     Transformer Engine. (On a GPU without Transformer Engine, add LOCAL's arguments.)
#   MEGATRON_LM_PATH  a Megatron-LM checkout, of the 0.16 line or from 0.18 on; without it
#                     megatron.training is that of the megatron-core wheel (0.19.2)
set -euo pipefail

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
LOCAL=(
    --transformer-impl local
    --no-rope-fusion
    --no-persist-layer-norm
    --no-masked-softmax-fusion
    --no-gradient-accumulation-fusion
)
case "${DEVICE:-gpu}" in
    gpu) MACHINE=(--bf16) ;;
    cpu) MACHINE=(--distributed-backend gloo "${LOCAL[@]}") ;;
    *) echo "train.sh: error: DEVICE=$DEVICE: choose gpu or cpu" >&2 && exit 2 ;;
esac
if [[ -n "${DATA:-}" ]]; then
    : "${TOKENIZER:?name the SentencePiece model that DATA was encoded with}"
    CORPUS=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER")
    if [[ -n "${VALID:-}" ]]; then
        CORPUS+=(--train-data-path "$DATA" --valid-data-path "$VALID")
    else
        CORPUS+=(--data-path "$DATA" --split 98,2,0)
    fi
else
    CORPUS=(--mock-data --tokenizer-type NullTokenizer --vocab-size 102399)
fi

export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTHONPATH="${MEGATRON_LM_PATH:+$MEGATRON_LM_PATH:}$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec torchrun --standalone --nproc-per-node "${GPUS:-1}" examples/megatron_lm/pretrain_coe_megatron.py \
    "${CHAIN[@]}" "${MODEL[@]}" "${EXPERTS[@]}" "${RECIPE[@]}" "${OUTPUT[@]}" "${MACHINE[@]}" \
    "${CORPUS[@]}" "$@"
