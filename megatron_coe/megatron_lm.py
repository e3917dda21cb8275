"""Old name of `megatron_coe.integrations.megatron_lm`, which users' scripts import."""

from megatron_coe.integrations.megatron_lm import add_coe_args, coe_builder

__all__ = ["add_coe_args", "coe_builder"]
