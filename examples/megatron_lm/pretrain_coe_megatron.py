"""Train a chain of experts with Megatron-LM's own `pretrain`, arguments and data.

    PYTHONPATH=path/to/Megatron-LM torchrun --nproc-per-node 8 \\
        examples/megatron_lm/pretrain_coe_megatron.py --coe-iterations 2 ...

`train.sh` beside this file has all arguments of the paper's CoE-2(4/64). What is not the model is
that of the checkout's `pretrain_gpt.py`: batches, loss, data sets.
"""

from __future__ import annotations

import sys
from functools import partial


def main() -> int:
    from megatron_coe.backends import prepare

    try:
        import pretrain_gpt as gpt
        from megatron.training import pretrain
        from model_provider import model_provider
    except ModuleNotFoundError as error:
        print(
            f"pretrain_coe_megatron.py: error: no module {error.name!r}: put a Megatron-LM "
            "checkout on PYTHONPATH, and what it needs into the environment",
            file=sys.stderr,
        )
        return 2
    prepare()

    from megatron.core.enums import ModelType

    from megatron_coe.megatron_compat.versions import PARTS_ARE_PARTIALS
    from megatron_coe.megatron_lm import add_coe_args, coe_builder

    gpt.train_valid_test_datasets_provider.is_distributed = True
    builder = partial(model_provider, coe_builder)
    parts = (gpt.train_valid_test_datasets_provider, ModelType.encoder_or_decoder, gpt.forward_step)
    if PARTS_ARE_PARTIALS:
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.arguments import parse_and_validate_args

        args = parse_and_validate_args(extra_args_provider=add_coe_args)
        pretrain(
            pretrain_cfg_container_from_args(args),
            *parts,
            model_provider=builder,
            get_embedding_ranks=gpt.get_embedding_ranks,
        )
    else:
        datasets, model_type, forward_step = parts
        pretrain(
            datasets,
            builder,
            model_type,
            forward_step,
            extra_args_provider=add_coe_args,
            get_embedding_ranks=gpt.get_embedding_ranks,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
