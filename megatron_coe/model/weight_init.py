"""Initial weights as a function of seed, parameter and position: the same model in every layout.

Megatron draws a rank's weights from generators of that rank, so another layout starts from another
model. Here the sharded state, which says under which name and where in the whole model each tensor
of a rank lies, is filled as if it were loaded from a checkpoint of the whole model. No rank makes
more than its own part.

A matrix is drawn in blocks of rows by a counter-based generator, Philox (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", 2011): its key is of the seed and the matrix's name, its
counter of the block. A rank draws the blocks that its rows lie in and keeps its columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b

import numpy as np
import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_coe.utils.ranks import cores_of_rank

Distribution = Callable[[np.random.Generator, np.ndarray], None]
"""Fills an array, fp32, row by row."""

BLOCK_ROWS = 64
"""Rows that one counter stands for; other blocks are other weights."""

_METADATA = {"singleton_local_shards": True}
"""Has Megatron name each layer, each expert, and gate and up projection, by themselves."""

_METHODS = ("init_method", "output_layer_init_method", "embedding_init_method")
"""Fields of the configuration by which Megatron's modules draw."""


@contextmanager
def undrawn_weights(config: TransformerConfig) -> Iterator[None]:
    """Have Megatron's modules draw no weights: those built here wait for `initialize_weights`.

    `perform_initialization` is on meanwhile, whatever it was set to: without it biases keep what
    the memory held, and 0.16 does not mark weights that are tensor-parallel, of which the
    gradients' norm then counts one rank's shard.
    """
    changes = {**dict.fromkeys(_METHODS, _draw_nothing), "perform_initialization": True}
    before = {name: getattr(config, name) for name in changes}
    for name, value in changes.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _draw_nothing(weight: Tensor) -> Tensor:
    return weight


@torch.no_grad()
def initialize_weights(model: GPTModel, seed: int) -> None:
    """Give this rank's part of a model the initial weights that belong to `seed`.

    Blocks are drawn by as many threads as the rank has cores (NumPy releases the GIL).

    Distributions are Megatron's (`init_method`, `output_layer_init_method`,
    `embedding_init_method`) and `CoERouter`'s. Vectors (norms, biases, iteration scales) stay as
    their modules made them: constant. Values are drawn in fp32, whatever the model's precision.

    Raises:
        ValueError: an init method of the configuration is not a normal distribution around 0.
    """

    def initialize(piece: object) -> object:
        if not isinstance(piece, ShardedTensor):
            return piece
        if piece.data.ndim > 1:
            part = _draw_part(piece, seed, _distribution(piece, model.config), threads)
            piece.data.copy_(torch.from_numpy(part))
        return piece.data

    with ThreadPoolExecutor(cores_of_rank()) as threads:
        for value in nested_values(model.sharded_state_dict(metadata=dict(_METADATA))):
            if isinstance(value, ShardedTensorFactory):  # a tensor of several: gate and up, experts
                value.data.copy_(value.merge_fn(dict_list_map_inplace(initialize, value.build())))
            else:
                initialize(value)


def _distribution(piece: ShardedTensor, config: TransformerConfig) -> Distribution:
    if ".router." in piece.key:
        # Kaiming-uniform with a = sqrt(5), as `CoERouter.reset_parameters` draws.
        return partial(_draw_uniform, bound=1 / math.sqrt(piece.global_shape[1]))
    return partial(_draw_normal, std=_std(piece.key, config))


def _draw_part(
    piece: ShardedTensor, seed: int, draw: Distribution, threads: ThreadPoolExecutor
) -> np.ndarray:
    """Draw a part [rows, columns] of the matrix that `seed` and the piece's name stand for."""
    (first_row, first_column), (rows, columns) = piece.global_offset, piece.local_shape
    width, last_row = piece.global_shape[1], first_row + rows
    key = int.from_bytes(blake2b(f"{seed} {piece.key}".encode(), digest_size=16).digest(), "little")
    part = np.empty((rows, columns), dtype=np.float32)

    def draw_block(block: int) -> None:
        start = block * BLOCK_ROWS
        begin, end = max(first_row, start), min(last_row, start + BLOCK_ROWS)
        # The lowest word of the counter is the generator's own.
        generator = np.random.Generator(np.random.Philox(key=key, counter=block << 64))
        wanted = part[begin - first_row : end - first_row]
        if wanted.shape == (end - start, width):
            draw(generator, wanted)
        else:  # from the block's first row and column
            drawn = np.empty((end - start, width), dtype=np.float32)
            draw(generator, drawn)
            wanted[:] = drawn[begin - start :, first_column : first_column + columns]

    blocks = range(first_row // BLOCK_ROWS, -(-last_row // BLOCK_ROWS))
    list(threads.map(draw_block, blocks))
    return part


def _draw_normal(generator: np.random.Generator, out: np.ndarray, std: float) -> None:
    generator.standard_normal(dtype=np.float32, out=out)
    out *= np.float32(std)


def _draw_uniform(generator: np.random.Generator, out: np.ndarray, bound: float) -> None:
    generator.random(dtype=np.float32, out=out)
    out *= 2
    out -= 1
    out *= np.float32(bound)


def _std(key: str, config: TransformerConfig) -> float:
    """Return the standard deviation of the init method that Megatron's modules take."""
    field = "init_method"
    if ".word_embeddings." in key:
        field = "embedding_init_method"
    elif ".linear_proj." in key or ".linear_fc2." in key:
        field = "output_layer_init_method"
    method = getattr(config, field)
    options = method.keywords if isinstance(method, partial) else {}
    if getattr(method, "func", None) is not torch.nn.init.normal_ or options.get("mean", 0.0):
        raise ValueError(
            f"{field}={method}: initial weights are drawn from normal distributions around 0; use "
            "megatron.core.utils.init_method_normal, or leave it out"
        )
    return options["std"]
