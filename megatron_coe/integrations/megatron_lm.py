"""The CoE model in Megatron's own training loop, built from its arguments.

`coe_builder` replaces a Megatron-LM checkout's `gpt_builder`, as the first argument of its
`model_provider`; `add_coe_args` is the `extra_args_provider`. `megatron.training` comes from such a
checkout on the path, or from the megatron-core wheel, for which
`megatron_coe.integrations.megatron_lm_pretrain` has the rest. The script in `examples/megatron_lm/`
is complete.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import fields

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_coe.megatron_compat.recompute import prepare_recompute
from megatron_coe.model.backends.select import refuse_unusable
from megatron_coe.model.field_rules import GROUP_SCORES, RESIDUAL_MODES
from megatron_coe.model.provider import CoEModelProvider

BACKENDS = {"transformer_engine": "te", "local": "torch"}
"""Our `backend` for Megatron-LM's `--transformer-impl`."""

FLAGS = {
    "add_bias_linear": "--disable-bias-linear",
    "apply_rope_fusion": "--no-rope-fusion",
    "backend": "--transformer-impl local",
    "gradient_accumulation_fusion": "--no-gradient-accumulation-fusion",
    "hidden_dropout": "--hidden-dropout 0",
    "moe_router_load_balancing_type": "--moe-router-load-balancing-type seq_aux_loss",
    "num_moe_experts": "--num-experts",
    "vocab_size": "--tokenizer-type, --vocab-size",
}
"""Megatron-LM's arguments for fields that a user knows by another name there."""


def add_coe_args(parser: ArgumentParser) -> ArgumentParser:
    """Add the arguments of a CoE model; all others are Megatron's own."""
    group = parser.add_argument_group(title="Chain-of-Experts")
    group.add_argument(
        "--coe-iterations", type=int, default=2, help="C, passes of a token through the experts"
    )
    group.add_argument(
        "--coe-residual",
        choices=RESIDUAL_MODES,
        default="inner",
        help="how iterations and layers are joined",
    )
    group.add_argument(
        "--coe-shared-gate",
        action="store_false",
        dest="coe_independent_gate",
        help="one router for all iterations instead of one each",
    )
    group.add_argument(
        "--coe-upcycled",
        action="store_true",
        help="upcycled from an MoE model: later iterations have a scale, initially zero",
    )
    group.add_argument(
        "--coe-megatron-dispatcher",
        action="store_true",
        help="dispatch tokens by Megatron's own all-to-all dispatcher",
    )
    group.add_argument(
        "--moe-router-group-score",
        choices=GROUP_SCORES,
        default="sum",
        help="what a group of experts is ranked by: the sum of its best scores, or the best one",
    )
    return parser


def coe_builder(
    args: Namespace,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> GPTModel:
    """Build a pipeline stage of the CoE model that Megatron-LM's arguments describe.

    Args:
        args: Megatron-LM's parsed and validated arguments, with those of `add_coe_args`.
        config: a `CoEModelProvider` to build instead of what `args` describe, or None.

    Raises:
        ValueError: arguments ask for what a CoE model cannot be; the message names both the
            field and the argument.
    """
    if config is None:
        config = provider_from_args(args)
    elif not isinstance(config, CoEModelProvider):
        raise ValueError(
            f"config is a {type(config).__name__}: coe_builder builds from the arguments "
            "(config=None) or from a CoEModelProvider."
        )
    try:
        refuse_unusable(config)
        prepare_recompute(config)
        return config.provide(pre_process, post_process, vp_stage, pg_collection)
    except ValueError as error:
        raise _with_flag(error) from error


def provider_from_args(args: Namespace) -> CoEModelProvider:
    """Translate Megatron's arguments into a `CoEModelProvider`.

    Megatron-LM's own function translates them; fields keep their names. One default differs: output
    projections are initialized with the std of all other linear layers, as in the paper, not with
    one scaled down by the depth.

    Raises:
        ValueError: see `coe_builder`.
    """
    from megatron.training.arguments import core_transformer_config_from_args

    _refuse_other_models(args)
    megatron = core_transformer_config_from_args(args)
    values = {f.name: getattr(megatron, f.name) for f in fields(megatron) if f.init}
    if not args.init_method_xavier_uniform:
        values["output_layer_init_method"] = None
    # Fields that only our configuration has come from the arguments of add_coe_args.
    own = {f.name for f in fields(CoEModelProvider)} - values.keys()
    values.update(
        {
            name: value
            for name, value in vars(args).items()
            if name in own and name.startswith(("coe_", "moe_"))
        }
    )
    if (
        getattr(args, "coe_megatron_dispatcher", False)
        and values["moe_token_dispatcher_type"] == "alltoall"
    ):
        values["moe_token_dispatcher_type"] = "megatron_alltoall"
    values.update(
        seq_length=args.max_position_embeddings,
        vocab_size=_vocab_size(args),
        make_vocab_size_divisible_by=args.padded_vocab_size,  # Megatron-LM has padded it
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        backend=BACKENDS[args.transformer_impl],
    )
    try:
        return CoEModelProvider(**values)
    except ValueError as error:
        raise _with_flag(error) from error


def _vocab_size(args: Namespace) -> int:
    """Return the number of token ids, from the tokenizer: the arguments hold the padded number.

    Without a tokenizer, as in programs that only convert weights, every row counts as a token.
    """
    from megatron.training import get_tokenizer

    try:
        return min(get_tokenizer().vocab_size, args.padded_vocab_size)
    except AssertionError:  # Megatron's, if the tokenizer was not initialized
        return args.padded_vocab_size


def _refuse_other_models(args: Namespace) -> None:
    """Refuse arguments of other models, which would be ignored."""
    if args.transformer_impl not in BACKENDS:
        raise ValueError(
            f"--transformer-impl {args.transformer_impl}: a CoE model is built of "
            f"{' or '.join(BACKENDS)}."
        )
    if args.position_embedding_type != "rope":
        raise ValueError(
            f"--position-embedding-type {args.position_embedding_type}: a CoE model has "
            "rotary positions. Give --position-embedding-type rope (with latent attention, "
            "--rope-type chooses between rope and yarn)."
        )
    ignored = {
        "spec": "the layers are those of a CoE model",
        "yaml_cfg": "the model is described by arguments",
        "experimental_attention_variant": "attention is latent or grouped-query attention",
        "heterogeneous_layers_config_path": "all layers are of one kind",
        "use_legacy_models": "the model is Megatron-Core's",
        "use_rope_scaling": "rotary positions are scaled by --rope-type yarn",
        "rotary_seq_len_interpolation_factor": "rotary positions are scaled by --rope-type yarn",
    }
    for name, reason in ignored.items():
        if getattr(args, name, None):
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(args, name)} does not go with a CoE "
                f"model: {reason}. Leave it out."
            )


def _with_flag(error: ValueError) -> ValueError:
    """Return the same error, with Megatron-LM's argument for the field it begins with."""
    field = str(error).partition("=")[0]
    flag = FLAGS.get(field, f"--{field.replace('_', '-')}" if field.isidentifier() else None)
    return ValueError(f"{error} (Megatron-LM's argument: {flag})" if flag else str(error))
