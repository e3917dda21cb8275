"""Choosing and preparing a backend."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest
import torch

from megatron_coe.megatron_compat import cpu, patches, transformer_engine
from megatron_coe.megatron_compat.versions import PARTS_ARE_PARTIALS
from megatron_coe.model.backends import select
from megatron_coe.model.field_rules import NEEDS_TE
from tests.stub_te import write_te


def test_preparing_twice_changes_nothing_more(device):
    stream, optimizer_init = torch.cuda.Stream, _distributed_optimizer().__init__
    assert select.prepare() == device
    assert torch.cuda.Stream is stream and _distributed_optimizer().__init__ is optimizer_init


def _distributed_optimizer():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return DistributedOptimizer


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_auto_is_plain_pytorch_without_transformer_engine(device):
    from megatron_coe.model.backends.torch import TorchSpecProvider

    assert device == torch.device("cpu") and not transformer_engine.have_te()
    assert isinstance(select.resolve_backend("auto"), TorchSpecProvider)
    assert isinstance(select.resolve_backend("torch"), TorchSpecProvider)


@pytest.mark.skipif(transformer_engine.have_te(), reason="Transformer Engine is installed")
def test_transformer_engine_is_refused_where_it_is_missing(device):
    with pytest.raises(ValueError, match="backend='te' needs Transformer Engine, which "):
        select.resolve_backend("te")


def test_an_unknown_backend_is_refused_with_the_choices(device):
    with pytest.raises(
        ValueError,
        match=r"backend='jax' is unknown: choose one of auto, torch, te, or te: and some",
    ):
        select.resolve_backend("jax")


@pytest.mark.parametrize("name", ["te:", "te:linear,head", "torch:linear", "auto:experts"])
def test_unknown_parts_are_refused_with_the_choices(device, name):
    with pytest.raises(ValueError, match=f"backend='{name}' is unknown.* linear, attention, exper"):
        select.te_parts(name)


def test_auto_takes_of_transformer_engine_what_a_setting_needs(monkeypatch):
    from tests.builders import tiny_provider

    monkeypatch.setattr(select, "have_te", lambda: True)
    plain = tiny_provider(backend="auto")
    assert select.te_parts_of(plain) == select.AUTO_PARTS == ()
    for name in ("tp_comm_overlap", "apply_rope_fusion", "gradient_accumulation_fusion"):
        assert select.te_parts_of(tiny_provider(backend="auto", **{name: True})) == select.TE_PARTS
    assert select.te_parts_of(tiny_provider(backend="te:experts")) == ("experts",)


def test_a_part_of_transformer_engine_has_what_only_all_of_it_has_refused(monkeypatch, device):
    from tests.builders import tiny_provider

    monkeypatch.setattr(select, "have_te", lambda: True)
    with pytest.raises(ValueError, match="apply_rope_fusion=True needs Transformer Engine"):
        select.refuse_unusable(tiny_provider(backend="te:attention", apply_rope_fusion=True))


def test_cpu_patches_refuse_to_hide_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=r"torch\.cuda\.is_available\(\) is true"):
        cpu.install()


@pytest.mark.parametrize("local_rank", ["3", "-1", "first"])
def test_a_local_rank_without_a_device_is_refused(monkeypatch, device, local_rank):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(ValueError, match=f"LOCAL_RANK={local_rank} names no CUDA device"):
        select.prepare()


STUBS = ("amp_C", "apex", "transformer_engine")


def pop_stubbed() -> dict[str, object]:
    """Take the modules that tests put stubs for out of `sys.modules`."""
    names = [name for name in sys.modules if name.partition(".")[0] in STUBS]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def fresh_imports():
    """Neither a real package that was imported before the test nor its stub after it."""
    real = pop_stubbed()
    yield
    pop_stubbed()
    sys.modules.update(real)
    patches._importable.cache_clear()
    patches._warn_of_foreign_apex.cache_clear()
    transformer_engine.import_error.cache_clear()


def test_apex_is_known_by_what_it_offers(tmp_path, monkeypatch, device, fresh_imports):
    monkeypatch.syspath_prepend(str(tmp_path))
    patches._importable.cache_clear()
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    assert not patches.have_apex()
    with pytest.warns(RuntimeWarning, match="is not NVIDIA Apex") as caught:
        patches.install()
        patches.install()
    assert len([w for w in caught if "NVIDIA Apex" in str(w.message)]) == 1

    (tmp_path / "apex" / "multi_tensor_apply.py").write_text("")
    (tmp_path / "amp_C.py").write_text("")
    patches._importable.cache_clear()
    patches._warn_of_foreign_apex.cache_clear()
    importlib.invalidate_caches()
    assert patches.have_apex()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        patches.install()


def test_a_broken_transformer_engine_stops_before_anything_is_patched(
    tmp_path, monkeypatch, fresh_imports
):
    """`import_error` alone is asked here: Megatron was imported without it long ago."""
    monkeypatch.syspath_prepend(str(write_te(tmp_path, __init__="raise OSError('no libcuda')")))
    monkeypatch.setattr(patches, "PATCHES", dict.fromkeys(patches.PATCHES, pytest.fail))
    transformer_engine.import_error.cache_clear()
    for ask in (
        transformer_engine.have_te,
        patches.install,
        lambda: select.resolve_backend("auto"),
    ):
        with pytest.raises(ValueError, match=r"cannot be imported.*: OSError: no libcuda") as error:
            ask()
        assert "\n" not in str(error.value)


def test_only_imports_of_transformer_engine_are_explained_by_it(
    tmp_path, monkeypatch, fresh_imports
):
    """Not an error of the same type from elsewhere, nor one that its functions raise later."""
    write_te(tmp_path, __init__="__version__ = '1'", pytorch="def run():\n    assert False, 'late'")
    monkeypatch.syspath_prepend(str(tmp_path))
    pytorch = importlib.import_module("transformer_engine.pytorch")
    with pytest.raises(AssertionError) as late:
        pytorch.run()
    assert transformer_engine.broken_by(late.value) is None
    assert transformer_engine.broken_by(AssertionError("elsewhere")) is None
    with pytest.raises(ImportError) as missing:
        importlib.import_module("transformer_engine.nothing")
    try:
        raise ValueError("hides it") from missing.value
    except ValueError as error:
        assert "No module named" in str(transformer_engine.broken_by(error))


def test_transformer_engines_provider_never_offers_legacy_experts(device):
    from megatron.core.extensions import transformer_engine_spec_provider as megatron_te

    from megatron_coe.megatron_compat.versions import experts_part, part_class
    from megatron_coe.model.backends.te import TESpecProvider

    provider = TESpecProvider()
    assert isinstance(provider, megatron_te.TESpecProvider)
    if megatron_te.TEColumnParallelGroupedLinear is None:
        with pytest.raises(ValueError, match="moe_grouped_gemm=True needs Transformer Engine"):
            provider.grouped_mlp_modules(True, True)
    else:
        part = experts_part(provider.grouped_mlp_modules(True, True))
        assert part_class(part).__name__ == "TEGroupedMLP"


@pytest.mark.parametrize(
    "field",
    [
        {"tp_comm_overlap": True},
        {"apply_rope_fusion": True},
        {"cuda_graph_impl": "local"},
        {"gradient_accumulation_fusion": True},
    ],
    ids=lambda field: next(iter(field)),
)
def test_what_the_backend_has_not_is_refused_by_name(device, field):
    from tests.builders import tiny_provider

    ((name, value),) = field.items()
    select.refuse_unusable(tiny_provider(backend="torch"))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        select.refuse_unusable(tiny_provider(backend="torch", **field))


def test_every_field_that_needs_transformer_engine_is_one_of_megatrons():
    from dataclasses import fields

    from megatron_coe.model.provider import CoEModelProvider

    here = {field.name for field in fields(CoEModelProvider)}
    assert set(select._NEED_TE) - set(NEEDS_TE) <= here
    if PARTS_ARE_PARTIALS:  # some of `NEEDS_TE` came with 0.19
        assert set(NEEDS_TE) <= here
