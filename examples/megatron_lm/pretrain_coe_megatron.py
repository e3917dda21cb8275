"""Train a CoE model with Megatron's own `pretrain`, arguments and data sets.

    torchrun --nproc-per-node 8 examples/megatron_lm/pretrain_coe_megatron.py --coe-iterations 2 ...

`megatron.training` is that of the megatron-core wheel (0.19.2, Python 3.12 and later), or of a
Megatron-LM checkout on PYTHONPATH. Batches, loss and data sets are the checkout's, out of its
`pretrain_gpt.py`; without one, those of `megatron_coe.integrations.megatron_lm_pretrain`.
`train.sh` beside this file has all arguments of the paper's CoE-2(4/64).
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.util import find_spec


def main() -> int:
    from megatron_coe.integrations.megatron_lm import add_coe_args, coe_builder
    from megatron_coe.megatron_compat import megatron_training
    from megatron_coe.model.backends import prepare

    try:
        prepare()
        megatron_training.install()
        if find_spec("pretrain_gpt"):  # of a checkout
            import pretrain_gpt as gpt
            from model_provider import model_provider

            model_provider = partial(model_provider, coe_builder)
            gpt.train_valid_test_datasets_provider.is_distributed = True
            options = {"get_embedding_ranks": gpt.get_embedding_ranks}
        else:
            from megatron_coe.integrations import megatron_lm_pretrain as gpt

            model_provider, options = gpt.model_provider, {}
    except ModuleNotFoundError as error:
        print(
            f"pretrain_coe_megatron.py: error: no module {error.name!r}: install megatron-core "
            "0.19.2 (Python 3.12 and later), or put a Megatron-LM checkout on PYTHONPATH and what "
            "it needs into the environment",
            file=sys.stderr,
        )
        return 2
    megatron_training.pretrain(
        gpt.train_valid_test_datasets_provider,
        model_provider,
        gpt.forward_step,
        add_coe_args,
        **options,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
