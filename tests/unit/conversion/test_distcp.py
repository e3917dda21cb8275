"""Reading and writing single tensors of a distributed checkpoint."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, load

from megatron_coe.conversion.distcp import CheckpointReader, CheckpointWriter


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "decoder.layers.a.weight": torch.randn(3, 4, 5, generator=generator),
        "b.weight": torch.randn(6, 2, generator=generator).bfloat16(),
    }


@pytest.fixture
def written(tensors, tmp_path):
    writer = CheckpointWriter(tmp_path)
    for layer in range(3):
        writer.write("decoder.layers.a.weight", tensors["decoder.layers.a.weight"][layer], layer, 3)
    writer.write("b.weight", tensors["b.weight"])
    writer.write_extra_state("decoder.layers.a._extra_state", (1, 2), (3, 4))
    writer.close()
    return tmp_path


def test_torch_reads_what_is_written(written, tensors):
    state = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    load(state, storage_reader=FileSystemReader(written), no_dist=True)
    for key, tensor in tensors.items():
        assert torch.equal(state[key], tensor), key
    metadata = FileSystemReader(written).read_metadata()
    assert "decoder.layers.a._extra_state/shard_1.2_3.4" in metadata.state_dict_metadata


def test_it_is_read_back_layer_by_layer(written, tensors):
    reader = CheckpointReader(written)
    assert set(reader.keys()) == set(tensors), "extra states are no weights"
    key = reader.find(["decoder.layers.a.weight"], 1)
    assert torch.equal(reader.read(key, 1), tensors[key][1])
    assert torch.equal(reader.read(key), tensors[key])
    assert torch.equal(reader.read("b.weight"), tensors["b.weight"])
    assert reader.dtype("b.weight") is torch.bfloat16


def test_no_tensor_brings_another_along(tmp_path):
    """A slice is stored alone, not with all of the tensor that it is cut from."""
    writer = CheckpointWriter(tmp_path)
    writer.write("a.weight", torch.zeros(1_000_000)[:10])
    writer.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10_000


class Attack:
    """What a forged index could hold: unpickling it creates a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_an_index_cannot_run_code(written):
    victim = written / "victim"
    (written / ".metadata").write_bytes(pickle.dumps(Attack(victim)))
    with pytest.raises(ValueError, match=r"\.metadata: no index.*io\.open"):
        CheckpointReader(written)
    assert not victim.exists()


def test_damage_is_named(written):
    path = written / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"__0_0\.distcp: .*a\.weight cannot be read"):
        CheckpointReader(written).read("decoder.layers.a.weight", 0)
    (written / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"\.metadata: no index"):
        CheckpointReader(written)
