"""Everything that patches or bridges versions of Megatron-Core and Transformer Engine.

    versions            names and signatures that differ between the supported Megatron-Core lines
    transformer_engine  whether Transformer Engine is installed, complete and usable here
    modules             reading and replacing what a module of theirs holds
    mtp                 the weight of multi-token prediction's losses
    recompute           selective recomputation without a compiler
    patches             what Megatron-Core gets wrong where Transformer Engine cannot be used
    cpu                 what Megatron-Core needs to run without CUDA
    megatron_training   what Megatron's own training loop needs besides

Nothing is patched at import: `megatron_coe.model.backends.prepare` applies what this machine needs,
and `megatron_training.install` what a program needs that calls Megatron's own `pretrain`.
"""
