"""Chains of experts in Megatron-Bridge: our provider as one of its model providers.

Needs Megatron-Bridge (`megatron.bridge`), which nothing else of the package imports. A recipe is in
docs/megatron_bridge.md.
"""

from __future__ import annotations

from copy import copy, deepcopy
from dataclasses import dataclass

from megatron.bridge.models.model_provider import ModelProviderMixin
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_coe.provider import CoEModelProvider


@dataclass
class CoEBridgeProvider(CoEModelProvider, ModelProviderMixin[GPTModel]):
    """`CoEModelProvider` with what Megatron-Bridge's training adds to a provider.

    As with Bridge's own providers nothing is checked or derived when one is made: recipes and
    command lines change fields first, and `finalize` follows.
    """

    vocab_size: int | None = None
    """Number of token ids; None for the tokenizer's, which Bridge fills in."""

    should_pad_vocab: bool = False
    """Whether the embedding tables are padded. Bridge pads where it has filled in `vocab_size`."""

    init_model_with_meta_device: bool = False
    """Bridge's: the model is built on the meta device, which Bridge makes the default for it."""

    tp_comm_overlap_cfg: str | dict | None = None
    """Bridge's: user buffers of `tp_comm_overlap`, a file or its content."""

    hf_model_id: str | None = None
    """Bridge's: where an export finds the tokenizer and what else goes with the weights."""

    def __post_init__(self) -> None:
        self._pg_collection: ProcessGroupCollection | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> CoEBridgeProvider:
        """A copy on the same process groups: Megatron's modules copy configurations."""
        memo[id(self._pg_collection)] = self._pg_collection
        memo[id(self)] = other = copy(self)
        other.__dict__ = {name: deepcopy(value, memo) for name, value in vars(self).items()}
        return other

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding tables."""
        return super().padded_vocab_size if self.should_pad_vocab else self.vocab_size

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Build the part of the model that belongs to this pipeline stage, on Bridge's groups."""
        return super().provide(pre_process, post_process, vp_stage, self._pg_collection)
