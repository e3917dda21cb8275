"""`CoEModelProvider`: a configuration that builds its own Megatron `GPTModel`.

The protocol (`provide(pre_process, post_process, vp_stage)`) is the one that Megatron-Bridge's
model providers follow, so a CoE model goes where theirs do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec_for_backend
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_coe.model.backends.select import backend_of
from megatron_coe.model.config import CoEConfig
from megatron_coe.model.gpt_model import LinearCrossEntropyModel
from megatron_coe.model.layer_specs import get_coe_decoder_block_spec
from megatron_coe.model.vocab_padding import mask_vocab_padding


@dataclass
class CoEModelProvider(CoEConfig):
    """The configuration of a CoE model, and how to build one pipeline stage of it.

    Megatron's parallel groups (`megatron.core.parallel_state`) exist before `provide` is called,
    with the sizes that the configuration names.
    """

    seq_length: int = 512
    """S: the longest sequence that the model will see."""

    backend: str = "auto"
    """`te` (Transformer Engine), `torch` (without it), `te:` and some of its parts (`linear`,
    `attention`, `experts`), or `auto`: te where a setting needs it, torch otherwise."""

    parallel_output: bool = True
    """Leave the logits split over the tensor-parallel ranks, as the parallel loss takes them."""

    fp16_lm_cross_entropy: bool = False
    """Megatron's: compute the loss of half-precision logits without casting them up."""

    def with_fields(self, **values: Any) -> CoEModelProvider:
        """Return a copy with other values of these fields. Raises: ValueError, as `finalize`."""
        return replace(self, **values)

    def finalize(self) -> None:
        """Check the fields, and derive what follows from them, once more: after assignments.

        Raises:
            ValueError: as the constructor does.
        """
        CoEConfig.__post_init__(self)

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> GPTModel:
        """Build the part of the model that belongs to this pipeline stage.

        Args:
            pre_process: has the embedding; None for "if this is the first stage".
            post_process: has the output layer; None for "if this is the last stage".
            vp_stage: index of the model chunk under interleaved pipelining.
            pg_collection: process groups; None for Megatron's global ones.

        Raises:
            ValueError: no vocabulary size is set, or the backend is unknown or not installed.
        """
        if not self.vocab_size or self.vocab_size < 1:
            raise ValueError(
                f"vocab_size={self.vocab_size}: set it to the tokenizer's number of ids."
            )
        stage = {"ignore_virtual": False, "vp_stage": vp_stage}
        if pre_process is None:
            pre_process = parallel_state.is_pipeline_first_stage(**stage)
        if post_process is None:
            post_process = parallel_state.is_pipeline_last_stage(**stage)
        backend = backend_of(self)
        decoder = get_coe_decoder_block_spec(self, backend, vp_stage, pg_collection)
        mtp = None
        if self.mtp_num_layers:
            mtp = get_gpt_mtp_block_spec_for_backend(self, decoder, backend, vp_stage=vp_stage)
        fuses = self.fuses_output_layer(on_gpu=torch.cuda.is_available())
        with _without_notices():
            model = (LinearCrossEntropyModel if fuses else GPTModel)(
                config=self,
                transformer_layer_spec=decoder,
                vocab_size=self.padded_vocab_size,
                max_sequence_length=self.seq_length,
                pre_process=pre_process,
                post_process=post_process,
                fp16_lm_cross_entropy=self.fp16_lm_cross_entropy,
                parallel_output=self.parallel_output,
                share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
                position_embedding_type="rope",
                rotary_percent=self.rotary_percent,
                rotary_base=self.rotary_base,
                mtp_block_spec=mtp,
                pg_collection=pg_collection,
                vp_stage=vp_stage,
            )
        if post_process and self.padded_vocab_size > self.vocab_size:
            sizes = (self.vocab_size, self.padded_vocab_size)
            mask_vocab_padding(model.output_layer, *sizes, model.pg_collection.tp)
        return model


@contextmanager
def _without_notices() -> Iterator[None]:
    """Silence what Megatron logs about every model of this package.

    "Unknown MLP type", for each layer of any class but its own, warns that no process groups are
    passed on; `megatron_coe.model.layer_specs` passes them. 0.19 calls every `GPTModel` deprecated.
    """
    names = ("megatron.core.transformer.transformer_layer", "megatron.core.models.gpt.gpt_model")
    loggers = [logging.getLogger(name) for name in names]

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "Unknown MLP type" not in message and "GPTModel IS DEPRECATED" not in message

    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
