# SPDX-License-Identifier: Apache-2.0
"""`CoeConfig`: the configuration of a Chain-of-Experts model, in the format of the paper's authors.

This file and `modeling_coe.py` are shipped inside every exported model. They need torch and
transformers (4.57 or 5.x) and nothing else.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

BOOLEANS_OF_MODE = {
    "inner": (True, False),
    "outer": (False, True),
    "inner_outer": (True, True),
    "none": (False, False),
}
"""(`inner_residual`, `outer_residual`) of each mode that they can express."""

KEY_MODES = ("inner", "outer", "addinit", "none")
"""The modes that the key `residual` can express."""

ROPE_TYPES = ("default", "yarn")
ROPE_KEYS = {
    "rope_type",
    "rope_theta",
    "factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "attention_factor",
    "truncate",
}
"""DeepSeek-V2's keys, and the two more of transformers' own YaRN."""
OWN_YARN = "deepseek_yarn"
"""`rope_type` of DeepSeek's YaRN in an export's `config.json`, beside the `type` that code for it
reads: without this file transformers 5 would take `yarn` for its own, and load no tokenizer."""

OWN_KEYS = {
    "attention_type": "mla",
    "head_dim": None,
    "use_qk_norm": False,
    "qkv_bias": False,
    "latent_norm_eps": 1e-6,
    "use_expert_bias": False,
    "coe_upcycled": False,
    "num_nextn_predict_layers": 0,
}
"""Keys that the authors' format lacks, and their defaults, which are never written."""

OPTIONAL_KEYS = ("residual", "inner_residual", "outer_residual", "pad_token_id")
"""Keys that are written only if they are set."""

AUTO_MAP = {
    "AutoConfig": "configuration_coe.CoeConfig",
    "AutoModel": "modeling_coe.CoeModel",
    "AutoModelForCausalLM": "modeling_coe.CoeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_coe.CoeForSequenceClassification",
}
"""The classes in an exported folder's code, for transformers and vLLM."""

LATENT_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


class CoeConfig(PretrainedConfig):
    r"""Configuration of a CoE model (arXiv 2506.18945): DeepSeek-V2's with iterations of experts.

    The defaults are the paper's model. Every key of DeepSeek-V2 keeps its name and meaning.
    `rope_theta` and `rope_scaling` (`null` or `{"type": "yarn", ...}`) are also read in the
    spelling of transformers 5 (`rope_parameters`), and written as here, like `torch_dtype`.
    `norm_topk_prob` normalizes the top-k probabilities *instead of* scaling them by
    `routed_scaling_factor`, as in DeepSeek-V2's own code. Layer i has experts if
    `i >= first_k_dense_replace` and `i % moe_layer_freq == 0`.

    Keys of the iterations:
        inner_iter (`int`): C, how often a token passes through a layer's experts.
        inner_residual, outer_residual (`bool`) and residual (`str`): how the iterations are joined,
            in the authors' older and newer spelling. Either is read, and each is written if it can
            express the mode (`addinit` has no booleans, `inner_outer` no key). See
            `residual_mode`. Default: `inner`.
        use_igate (`bool`): a router per iteration, `mlp.gate.{t}`, or one for all, `mlp.gate`.
        aux_loss_alpha (`float`), seq_aux (`bool`): coefficient of the auxiliary load-balancing
            loss, and whether it is taken per sequence or over the batch. It acts on the gradient in
            training mode; the reported loss is the cross-entropy alone.

    Keys of this project, which the paper's models do not need; a default is never written:
        scoring_func (`str`): `softmax` as in the authors' format, or `sigmoid`: experts are
            selected by sigmoid(logit) plus bias and weighted by sigmoid(logit), normalized if K > 1
            (whatever `norm_topk_prob` is) and then scaled.
        use_expert_bias (`bool`): with `sigmoid`, each router has the weight
            `e_score_correction_bias` [N] (DeepSeek-V3's name), added for the selection only.
        attention_type (`str`): `mla`, multi-head latent attention, or `mha`, plain attention with
            `num_key_value_heads`, `head_dim` (null: hidden_size / num_attention_heads) and
            half-rotation rope; weights `q_proj`, `k_proj`, `v_proj`, `o_proj`.
        qkv_bias, use_qk_norm (`bool`): with `mha`, biases of q, k and v, and an RMS norm over each
            head of q and k (`q_norm`, `k_norm`).
        latent_norm_eps (`float`): epsilon of the norms inside latent attention, which DeepSeek-V2
            fixes at 1e-6, whatever `rms_norm_eps` is.
        coe_upcycled (`bool`): upcycled from a standard MoE model. Iteration t >= 1 (counted from 0)
            is scaled by the weight `mlp.coe_weights.{t}` [H]:
            x(1) = f_1(x(0)), x(t+1) = x(t) + a_t * f_{t+1}(x(t)); the layer's output is h + x(C).
        num_nextn_predict_layers (`int`): layers of multi-token prediction, DeepSeek-V3's key. The
            folder holds them after the others, as `model.layers.{num_hidden_layers}` and so on;
            the model neither loads nor runs them.

    Raises:
        ValueError: a value is invalid or does not fit another; the message names the key.
    """

    model_type = "coe_deepseekv2"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - Trainer adds a list
    base_model_tp_plan = {  # noqa: RUF012 - transformers' own name and type
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.q_b_proj": "colwise",
        "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.*.gate_proj": "colwise",
        "layers.*.mlp.experts.*.up_proj": "colwise",
        "layers.*.mlp.experts.*.down_proj": "rowwise",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(
        self,
        vocab_size: int = 102400,
        hidden_size: int = 1024,
        intermediate_size: int = 2816,
        moe_intermediate_size: int = 704,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        n_shared_experts: int | None = 1,
        n_routed_experts: int = 63,
        num_experts_per_tok: int = 4,
        routed_scaling_factor: float = 1.0,
        q_lora_rank: int | None = None,
        kv_lora_rank: int = 512,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        topk_method: str = "greedy",
        n_group: int | None = 1,
        topk_group: int | None = 1,
        norm_topk_prob: bool = False,
        scoring_func: str = "softmax",
        first_k_dense_replace: int = 0,
        moe_layer_freq: int = 1,
        aux_loss_alpha: float = 0.001,
        seq_aux: bool = True,
        inner_iter: int = 2,
        inner_residual: bool | None = None,
        outer_residual: bool | None = None,
        residual: str | None = None,
        use_igate: bool = True,
        hidden_act: str = "silu",
        max_position_embeddings: int = 163840,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        rope_theta: float | None = None,
        rope_scaling: dict | None = None,
        rope_parameters: dict | None = None,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        attention_type: str = "mla",
        head_dim: int | None = None,
        use_qk_norm: bool = False,
        qkv_bias: bool = False,
        latent_norm_eps: float = 1e-6,
        use_expert_bias: bool = False,
        coe_upcycled: bool = False,
        num_nextn_predict_layers: int = 0,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.n_shared_experts = n_shared_experts
        self.n_routed_experts = n_routed_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.routed_scaling_factor = routed_scaling_factor
        self.q_lora_rank = q_lora_rank
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        # `gready` is how DeepSeek-V2's own configuration spells its default.
        self.topk_method = "greedy" if topk_method == "gready" else topk_method
        self.n_group = n_group
        self.topk_group = topk_group
        self.norm_topk_prob = norm_topk_prob
        self.scoring_func = scoring_func
        self.first_k_dense_replace = first_k_dense_replace
        self.moe_layer_freq = moe_layer_freq
        self.aux_loss_alpha = aux_loss_alpha
        self.seq_aux = seq_aux
        self.inner_iter = inner_iter
        self.use_igate = use_igate
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.attention_type = attention_type
        self.use_qk_norm = use_qk_norm
        self.qkv_bias = qkv_bias
        self.latent_norm_eps = latent_norm_eps
        self.use_expert_bias = use_expert_bias
        self.coe_upcycled = coe_upcycled
        self.num_nextn_predict_layers = num_nextn_predict_layers
        self.use_cache = use_cache
        # Other software reads it as the width of a head: the larger of MLA's two.
        latent_head = qk_nope_head_dim + qk_rope_head_dim
        plain_head = head_dim or hidden_size // num_attention_heads
        self.head_dim = latent_head if attention_type == "mla" else plain_head

        mode = residual_mode(residual, inner_residual, outer_residual)
        self.residual = mode if mode in KEY_MODES else None
        booleans: tuple[bool | None, bool | None] = BOOLEANS_OF_MODE.get(mode, (None, None))
        self.inner_residual, self.outer_residual = booleans
        self.rope_parameters = _rope_parameters(rope_theta, rope_scaling, rope_parameters)
        self._check()
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    # -- derived values ----------------------------------------------------------------------

    @property
    def residual_mode(self) -> str:
        """The way iterations and layers are joined, for x(0) = norm(h), f_t the experts' update:

        | mode          | x(t)                 | layer output |
        |---------------|----------------------|--------------|
        | `inner`       | x(t-1) + f_t(x(t-1)) | x(C)         |
        | `outer`       | f_t(x(t-1))          | h + x(C)     |
        | `addinit`     | x(0) + f_t(x(t-1))   | x(C)         |
        | `inner_outer` | x(t-1) + f_t(x(t-1)) | h + x(C)     |
        | `none`        | f_t(x(t-1))          | x(C)         |
        """
        return residual_mode(self.residual, self.inner_residual, self.outer_residual)

    @property
    def adds_stream(self) -> bool:
        """Whether a layer with experts outputs h + x(C) (True) or x(C) alone."""
        return self.residual_mode in ("outer", "inner_outer")

    @property
    def rope_theta(self) -> float:
        return self.rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = {**self.rope_parameters, "rope_theta": value}

    @property
    def rope_scaling(self) -> dict | None:
        """The rotary scaling in the authors' format, None if there is none."""
        rope = dict(self.rope_parameters)
        kind = rope.pop("rope_type")
        rope.pop("rope_theta")
        return None if kind == "default" else {"type": kind, **rope}

    @rope_scaling.setter
    def rope_scaling(self, value: dict | None) -> None:
        self.rope_parameters = _rope_parameters(self.rope_theta, value, None)

    @property
    def torch_dtype(self) -> Any:
        """The weights' dtype: the authors' name of what transformers now calls `dtype`."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: Any) -> None:
        self.dtype = value

    def has_experts(self, layer: int) -> bool:
        """Return whether a layer (counted from 0) is a CoE layer, not a dense one."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def mtp_weights(self) -> str | None:
        """Pattern of the names of weights of multi-token prediction; None if there are none."""
        first, count = self.num_hidden_layers, self.num_nextn_predict_layers
        layers = "|".join(map(str, range(first, first + count)))
        return rf"^(model\.)?layers\.({layers})\." if layers else None

    # -- writing -------------------------------------------------------------------------------

    def to_dict(self) -> dict:
        """Return all keys in the authors' spelling, those of this project unless default."""
        result = super().to_dict()
        result.pop("rope_parameters", None)
        result |= {"rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling}
        if "dtype" in result:
            result["torch_dtype"] = result.pop("dtype")
        omitted = {
            *(key for key, default in OWN_KEYS.items() if result.get(key) == default),
            *(key for key in OPTIONAL_KEYS if result.get(key) is None),
            *(LATENT_KEYS if self.attention_type == "mha" else ["head_dim"]),
        }
        return {key: value for key, value in result.items() if key not in omitted}

    # -- checks --------------------------------------------------------------------------------

    def _check(self) -> None:
        _one_of("attention_type", self.attention_type, ("mla", "mha"))
        _one_of("scoring_func", self.scoring_func, ("softmax", "sigmoid"))
        _one_of("topk_method", self.topk_method, ("greedy", "group_limited_greedy"))
        for key in ("inner_iter", "n_routed_experts", "num_experts_per_tok", "moe_layer_freq"):
            if type(getattr(self, key)) is not int or getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)!r}: give an integer >= 1.")
        later = self.num_nextn_predict_layers
        if type(later) is not int or later < 0:
            raise ValueError(f"num_nextn_predict_layers={later!r}: give an integer >= 0.")
        N, K = self.n_routed_experts, self.num_experts_per_tok
        if K > N:
            raise ValueError(f"num_experts_per_tok={K} is larger than n_routed_experts={N}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}."
            )
        if self.topk_method == "group_limited_greedy":
            groups, kept = self.n_group or 1, self.topk_group or 1
            if N % groups or kept > groups or kept * (N // groups) < K:
                raise ValueError(
                    f"n_group={groups}, topk_group={kept}: {N} routed experts must divide into "
                    f"n_group groups, of which topk_group hold at least num_experts_per_tok={K}."
                )
        if self.use_expert_bias and self.scoring_func != "sigmoid":
            raise ValueError(
                "use_expert_bias=True needs scoring_func='sigmoid': softmax scores have no bias."
            )
        if self.coe_upcycled and self.residual_mode != "outer":
            raise ValueError(
                f"coe_upcycled=True with the residual mode {self.residual_mode!r}: an upcycled "
                "layer adds the residual stream, as its MoE model does. Set residual: outer."
            )


def residual_mode(residual: str | None, inner: bool | None, outer: bool | None) -> str:
    """Return the residual mode that either spelling gives; `inner` without both.

    Raises:
        ValueError: the mode is unknown, or the spellings disagree.
    """
    if residual is not None:
        _one_of("residual", residual, KEY_MODES)
    if inner is None and outer is None:
        return residual or "inner"
    booleans = (bool(inner), bool(outer))
    (mode,) = (mode for mode, value in BOOLEANS_OF_MODE.items() if value == booleans)
    if residual is not None and residual != mode:
        raise ValueError(
            f"residual={residual!r} disagrees with inner_residual={inner}, outer_residual={outer}, "
            f"which mean {mode!r}: remove one spelling, or make them agree."
        )
    return mode


def _rope_parameters(
    rope_theta: float | None, rope_scaling: dict | None, rope_parameters: dict | None
) -> dict:
    """One dictionary with `rope_type` and `rope_theta`, whatever the spelling it came in."""
    rope = {**(rope_scaling or {}), **(rope_parameters or {})}
    rope = {key: value for key, value in rope.items() if value is not None}
    old_type = rope.pop("type", "default")
    rope.setdefault("rope_type", old_type)
    if rope["rope_type"] == OWN_YARN:
        rope["rope_type"] = "yarn"
    if rope_theta is not None:
        rope["rope_theta"] = rope_theta
    rope.setdefault("rope_theta", 10000.0)
    if unknown := rope.keys() - ROPE_KEYS:
        raise ValueError(f"rope_scaling={rope}: unknown keys: {', '.join(sorted(unknown))}.")
    _one_of("rope_scaling type", rope["rope_type"], ROPE_TYPES)
    if rope["rope_type"] == "yarn" and not rope.get("factor"):
        raise ValueError(f"rope_scaling={rope}: yarn needs a factor.")
    if rope["rope_type"] == "yarn":
        rope.setdefault("original_max_position_embeddings", 4096)  # DeepSeek-V2's default
    return rope


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}={value!r} is unknown: choose one of {', '.join(choices)}.")
