"""Where `CoEBridgeProvider` stood before; use `megatron_coe.integrations.megatron_bridge`."""

from megatron_coe.integrations.megatron_bridge import CoEBridgeProvider as CoEBridgeProvider
