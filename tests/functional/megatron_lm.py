"""One small model and its training twice: in Megatron's arguments and in this package's fields."""

from __future__ import annotations

import shlex

STEPS, LR, DECAY, CLIP, SEED, SEQ_LENGTH = 4, 5e-3, 0.1, 0.5, 7, 32

MODEL = shlex.split(f"""
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48
    --multi-latent-attention --kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 8
    --v-head-dim 8 --qk-layernorm --position-embedding-type rope --rope-type yarn
    --rotary-scaling-factor 40 --mscale 0.707 --mscale-all-dim 0.707 --normalization RMSNorm
    --norm-epsilon 1e-6 --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --hidden-dropout 0 --attention-dropout 0 --init-method-std 0.05 --num-experts 6
    --moe-router-topk 2 --moe-ffn-hidden-size 16 --moe-shared-expert-intermediate-size 24
    --moe-grouped-gemm --moe-router-pre-softmax --moe-router-dtype fp32
    --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 0.02 --transformer-impl local --use-cpu-initialization
    --no-bias-swiglu-fusion --no-rope-fusion --no-persist-layer-norm --no-masked-softmax-fusion
    --no-gradient-accumulation-fusion --coe-iterations 3 --coe-residual inner
    --seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH}
    --tokenizer-type NullTokenizer --vocab-size 94 --make-vocab-size-divisible-by 16
""")
TRAINING = shlex.split(f"""
    --train-iters {STEPS} --lr {LR} --lr-decay-style constant --weight-decay {DECAY}
    --clip-grad {CLIP} --adam-beta2 0.95 --seed {SEED} --distributed-backend gloo
    --log-interval 1 --eval-iters 1 --eval-interval 1000
""")

FIELDS = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 8,
    "num_moe_experts": 6,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "moe_aux_loss_coeff": 0.02,
    "coe_iterations": 3,
    "coe_residual": "inner",
    "vocab_size": 94,
    "make_vocab_size_divisible_by": 16,
    "seq_length": SEQ_LENGTH,
    "init_method_std": 0.05,
    "use_cpu_initialization": True,
}
"""What MODEL describes, in fields of `CoEModelProvider`."""
