"""Old name of `megatron_coe.integrations.megatron_bridge`, which saved run configs name."""

from megatron_coe.integrations.megatron_bridge import CoEBridgeProvider as CoEBridgeProvider
