"""Everything that patches or bridges versions of Megatron-Core and Transformer Engine.

    versions    what the supported Megatron-Core lines name or shape differently
    mtp         the weight of multi-token prediction's losses
    recompute   selective recomputation without a compiler
    patches     what Megatron-Core gets wrong where Transformer Engine is absent
    cpu         what Megatron-Core needs to run without CUDA

Nothing is patched at import: `megatron_coe.backends.prepare` applies what this machine needs.
"""
