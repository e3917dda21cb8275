"""The benchmarks: each builds its variants, times them in turns and returns an `Outcome`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from benchmarks import (
    expert_products,
    head,
    kernels,
    layers,
    memory,
    phases,
    steps,
    transformers_baseline,
)
from benchmarks.agreement import check_agreement
from benchmarks.communication import exposed_share
from benchmarks.expert_peers import peers
from benchmarks.host_syncs import count_host_syncs
from benchmarks.layers import BACKWARD, FORWARD, PassVariant
from benchmarks.report import Outcome
from benchmarks.scale import Scale, preset_settings
from benchmarks.steps import GRADIENTS, PARTS, StepVariant
from benchmarks.timing import TOTAL, Samples, Spread, Variant, interleave, rate, ratio
from megatron_coe.config.model_section import build_provider
from megatron_coe.config.run_config import Settings
from megatron_coe.distributed.seeds import seed_everything
from megatron_coe.model.backends.select import TE_PARTS
from megatron_coe.model.moe.grouped_linear import BACKENDS
from megatron_coe.model.provider import CoEModelProvider
from megatron_coe.planning.hardware import peak_flops
from megatron_coe.training.optimizer_step import OneSyncOptimizerStep

COE, MOE = "coe-2_4-64", "moe_8-64"
MATCHED_COE, MATCHED_MOE = "coe-2_3-64", "moe_7-64"


@dataclass(frozen=True)
class Harness:
    """Parameters of all benchmarks: the device, the sizes and the numbers of repetitions."""

    presets: Path
    """Folder of the paper's models."""
    scale: Scale
    device: torch.device
    rounds: int
    warmup: int
    clock: str
    profiles: int = 3
    """Number of profiled steps for the table of phases; 0: no table."""
    steps: int = 1000
    """Of the benchmark `long`."""
    setting_variants: tuple[tuple[str, ...], ...] = ()
    """Settings to compare, each a tuple of `section.key=value`; empty: compare CoE with MoE."""
    changes: tuple[str, ...] = ()
    """`section.key=value` for every variant."""

    def check(self) -> None:
        """Check presets and overrides before any benchmark runs.

        Raises:
            ValueError: an override is invalid.
            OSError: a preset is missing.
        """
        for preset, changes in self.models((COE, MOE)).values():
            build_provider(self.settings(preset, *changes), self.device)

    def settings(self, preset: str, *changes: str) -> Settings:
        """Load a preset at the scale, with changes."""
        return preset_settings(self.presets / f"{preset}.yaml", self.scale, *changes, *self.changes)

    def provider(self, preset: str, *changes: str) -> CoEModelProvider:
        """Build the provider of a layer by itself, whose auxiliary losses are not scaled."""
        settings = self.settings(preset, *changes)
        seed_everything(settings.train.seed)
        provider = build_provider(settings, self.device)
        return provider.with_fields(calculate_per_token_loss=False)

    def time(self, variants: Sequence[Variant]) -> Samples:
        """Time variants that take turns."""
        return interleave(variants, self.rounds, self.warmup, self.device, self.clock)

    def models(self, pair: tuple[str, str]) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Return name -> (preset, changes) of the pair, or of the setting variants of its first."""
        if self.setting_variants:
            return {f"{pair[0]} {' '.join(v)}": (pair[0], v) for v in self.setting_variants}
        return {preset: (preset, ()) for preset in pair}


def experts(harness: Harness) -> Outcome:
    """Time the routed experts, forward and backward, beside Megatron's and the dense ceiling."""
    models = harness.models((COE, MOE))
    variants: list[PassVariant] = []
    providers = []
    for name, (preset, changes) in models.items():
        provider = harness.provider(preset, *changes)
        experts = layers.build_layer(provider, harness.device).experts
        variants.append(
            layers.experts_variant(name, experts, provider, harness.scale.tokens, harness.device)
        )
        providers.append(provider)
    stock = _stock_experts(harness, providers[0], variants[0])
    differences = _agreement(variants[0], stock)
    others = [*peers(providers[0], harness.scale.tokens, harness.device), stock]
    timed = [variant.variant() for variant in (*variants, *others)]
    dense = layers.dense_variant(providers[0], harness.scale.tokens, harness.device)
    square = layers.square_variant(harness.device)
    samples = harness.time([*timed, dense, square])
    outcome = _pass_table(harness, "experts", "Routed experts", [*timed, dense], samples)
    outcome.header += ["rate / dense", f"rate / {square.name}"]
    for variant, row in zip([*timed, dense], outcome.rows, strict=True):
        row += [_rate_over(samples, variant, other).text() for other in (dense, square)]
    on_gpu = harness.device.type == "cuda"
    outcome.figures["experts"] = _rate_over(samples, timed[0], square if on_gpu else dense)
    if peak := on_gpu and peak_flops(torch.cuda.get_device_name(harness.device)):
        seconds = samples[square.name][TOTAL]
        outcome.figures["square"] = Spread.of([square.flops / peak / time for time in seconds])
    outcome.details["differences"] = differences
    _discard(variant.module for variant in (*variants, *others))
    if harness.device.type == "cuda":  # a CPU has the loop alone
        for name, provider in zip(models, providers, strict=True):
            outcome.further.append(_product_table(harness, name, provider))
    return outcome


def _product_table(harness: Harness, name: str, provider: CoEModelProvider) -> Outcome:
    """Time one call of the experts by every backend of grouped GEMMs that can be used here."""
    call = expert_products.random_call(provider, harness.scale.tokens, harness.device)
    variants = expert_products.product_variants(provider, call)
    samples = harness.time(variants)
    rows = f"{len(call.dy):,} rows"
    outcome = Outcome("products", f"Products of the experts of {name}, {rows}", samples=samples)
    parts = expert_products.PARTS
    outcome.header = ["backend", *(f"{part}, ms" for part in parts)]
    outcome.header += [f"{part}: rate / dense" for part in (*parts, TOTAL)]
    for variant in variants:
        times = [Spread.of([1e3 * s for s in samples[variant.name][part]]) for part in parts]
        rates = [ratio(samples, expert_products.DENSE, variant.name, p) for p in (*parts, TOTAL)]
        outcome.rows.append([variant.name, *(spread.text() for spread in (*times, *rates))])
    missing = {name: call.missing(name) for name in BACKENDS}
    outcome.details["missing"] = {name: what for name, what in missing.items() if what}
    return outcome


def expert_tiles(harness: Harness) -> Outcome:
    """Time the candidates of the Triton kernels' tiles, at both numbers of rows per expert.

    Raises:
        ValueError: the kernels cannot run here.
    """
    outcome = Outcome("tiles", "Tiles of the experts' Triton kernels, microseconds")
    outcome.header = ["model", "product", "tile", "time"]
    for name, (preset, changes) in harness.models((COE, MOE)).items():
        provider = harness.provider(preset, *changes)
        call = expert_products.random_call(provider, harness.scale.tokens, harness.device)
        if missing := call.missing("triton"):
            raise ValueError(f"--what tiles needs {missing}: leave it out")
        for product, variants in expert_products.tile_variants(call).items():
            samples = harness.time(variants)
            for variant in variants:
                spread = Spread.of([1e6 * s for s in samples[variant.name][product]])
                outcome.rows.append([name, product, variant.name, spread.text(0)])
    return outcome


def te_parts(harness: Harness) -> Outcome:
    """Time a training step with each part of Transformer Engine by itself, with all and with none.

    Raises:
        ValueError: Transformer Engine cannot be used.
    """
    parts = ("torch", "te", *(f"te:{part}" for part in TE_PARTS))
    variants = tuple((f"model.backend={part}",) for part in parts)
    return _steps(replace(harness, setting_variants=variants), "te", (COE, COE))


def layer(harness: Harness) -> Outcome:
    """Time the layer: CoE, MoE, and Megatron's own called C times."""
    variants = _layer_variants(harness)
    differences = _agreement(variants[0], variants[-1])
    timed = [variant.variant() for variant in variants]
    samples = harness.time(timed)
    outcome = _pass_table(harness, "layer", "One layer", timed, samples)
    outcome.header.append(f"time / {timed[0].name}")
    for variant, row in zip(timed, outcome.rows, strict=True):
        row.append(ratio(samples, variant.name, timed[0].name).text())
    outcome.figures["layer"] = ratio(samples, timed[-1].name, timed[0].name)
    if not harness.setting_variants:
        outcome.figures["layer coe / moe"] = ratio(samples, timed[0].name, timed[1].name)
    outcome.details["differences"] = differences
    if harness.profiles:
        work = {
            variant.name: (variant.work, list(phases.targets(variant.module)))
            for variant in variants
        }
        outcome.further.append(_phase_table(harness, work))
    _discard(variant.module for variant in variants)
    return outcome


def _layer_variants(harness: Harness) -> list[PassVariant]:
    """Build the models' layers, and last Megatron's with the weights of the first."""
    variants: list[PassVariant] = []
    batch: tuple[Tensor, Tensor] | None = None
    for name, (preset, changes) in harness.models((COE, MOE)).items():
        provider = harness.provider(preset, *changes)
        if batch is None:
            batch = layers.random_batch(provider, harness.scale.sequences, harness.device)
        module = layers.build_layer(provider, harness.device)
        if not variants:
            stock = layers.build_stock(provider, harness.device)
            stock.share_weights(module)
            last = layers.layer_variant("stock MoELayer, C times", stock, provider, batch)
        variants.append(layers.layer_variant(name, module, provider, batch))
    return [*variants, last]


def step(harness: Harness) -> Outcome:
    """Time a training step: CoE-2(4/64) and MoE(8/64)."""
    return _steps(harness, "step", (COE, MOE))


def matched(harness: Harness) -> Outcome:
    """Time a training step of the pair with exactly equal expert passes."""
    return _steps(harness, "matched", (MATCHED_COE, MATCHED_MOE))


def output_head(harness: Harness) -> Outcome:
    """Time the output layer with its loss, which is the same for CoE and MoE."""
    benchmark = head.random_head(harness.provider(MOE), harness.scale.tokens, harness.device)
    variants = benchmark.variants()
    first, *others = benchmark.losses()
    expected = benchmark.result(first)
    differences = {
        f"{name}: {value}": difference
        for name in others
        for value, difference in check_agreement(
            (name, first), benchmark.result(name), expected, benchmark.x.dtype
        ).items()
    }
    samples = harness.time(variants)
    outcome = _pass_table(harness, "head", "Output layer and loss", variants, samples)
    outcome.header += [f"time / {head.PRODUCTS}", "peak, MiB"]
    peaks = {variant.name: benchmark.peak_bytes(variant) for variant in variants}
    for variant, row in zip(variants, outcome.rows, strict=True):
        row.append(ratio(samples, variant.name, head.PRODUCTS).text())
        row.append(f"{peaks[variant.name] / 2**20:,.0f}")
    outcome.figures["head"] = ratio(samples, head.CHUNKS, head.PRODUCTS)
    outcome.details |= {"differences": differences, "peaks": peaks}
    return outcome


def transformers(harness: Harness) -> Outcome:
    """Time forward and backward of MoE(8/64) here and in transformers, with the same weights."""
    pair = transformers_baseline.build_pair(
        harness.settings(MOE, *transformers_baseline.CHANGES), harness.device
    )
    variants = pair.variants()
    differences = check_agreement(
        (variants[0].name, variants[1].name), *pair.results(), pair.provider.params_dtype
    )
    samples = harness.time(variants)
    title = "MoE(8/64), a step without the update, transformers with `grouped_mm`"
    outcome = _pass_table(harness, "transformers", title, variants, samples)
    outcome.header.append("tokens/s")
    for variant, row in zip(variants, outcome.rows, strict=True):
        row.append(_tokens_per_second(samples, variant).text(0))
    outcome.figures["transformers"] = ratio(samples, variants[1].name, variants[0].name)
    outcome.details["differences"] = differences
    _discard([pair.ours])
    return outcome


def peak_memory(harness: Harness) -> Outcome:
    """Measure the held and the temporary bytes of a training step, one model after the other."""
    outcome = Outcome("memory", f"Memory of a training step, {_sizes(harness)}")
    outcome.header = ["model", "held", *(f"passing, {part}" for part in PARTS), "peak"]
    found = {}
    for name, (preset, changes) in harness.models((COE, MOE)).items():
        variant = steps.build_step(name, harness.settings(preset, *changes), harness.device)
        variant.trainer.step()
        held = memory.held_by(variant.trainer.train_state)
        found[name] = memory.footprint(held, variant.variant().run, harness.device)
        of_parts = [found[name].passing[part] for part in PARTS]
        sizes = (found[name].held, *of_parts, found[name].peak)
        outcome.rows.append([name, *(f"{value / 2**20:,.0f} MiB" for value in sizes)])
        outcome.details[name] = dict(zip(outcome.header[1:], sizes, strict=True))
        _discard(variant.trainer.train_state.chunks)
        del variant, held
    if not harness.setting_variants:
        ours, theirs = found.values()
        passing = ours.passing[GRADIENTS] / theirs.passing[GRADIENTS]
        outcome.figures["memory"] = Spread.of([ours.peak / theirs.peak])
        outcome.figures["memory passing"] = Spread.of([passing])
    return outcome


def host_syncs(harness: Harness) -> Outcome:
    """Count the host syncs of a training step."""
    how = "waits" if harness.device.type == "cuda" else "calls that would wait on a GPU"
    outcome = Outcome("host_syncs", f"Host syncs of a training step ({how})")
    outcome.header = ["model", "in all", "by place"]
    for name, (preset, changes) in harness.models((COE, MOE)).items():
        variant = steps.build_step(name, harness.settings(preset, *changes), harness.device)
        step = variant.trainer.train_step  # on a CPU, too, with the update that a GPU has
        step.update = OneSyncOptimizerStep(variant.trainer.train_state)
        variant.trainer.step()
        counts = count_host_syncs(variant.trainer.step, harness.device)
        places = ", ".join(f"{place} {count}" for place, count in counts.most_common())
        outcome.rows.append([name, str(counts.total()), places])
        outcome.figures.setdefault("host_syncs", Spread.of([counts.total()]))
        _discard(variant.trainer.train_state.chunks)
    return outcome


def parallel(harness: Harness) -> Outcome:
    """Measure the exposed communication of a step, experts parallelized over all ranks.

    Raises:
        ValueError: there is one rank.
    """
    ranks = torch.distributed.get_world_size()
    if ranks < 2:
        raise ValueError("--what parallel needs several ranks: start it with torchrun")
    outcome = Outcome("parallel", f"Experts over {ranks} ranks, {_sizes(harness)}")
    outcome.header = ["model", "seconds per step", "exposed share of communication"]
    variants = _parallel_variants(harness, ranks)
    outcome.samples = harness.time([variant.variant() for variant in variants])
    shares: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in range(harness.rounds):
        for variant in variants:
            shares[variant.name].append(exposed_share(variant.trainer.step, harness.device))
    for variant in variants:
        seconds = Spread.of(outcome.samples[variant.name][TOTAL])
        outcome.rows.append([variant.name, seconds.text(), Spread.of(shares[variant.name]).text()])
    outcome.figures["parallel"] = Spread.of(shares[variants[0].name])
    _discard(chunk for variant in variants for chunk in variant.trainer.train_state.chunks)
    return outcome


def _parallel_variants(harness: Harness, ranks: int) -> list[StepVariant]:
    experts = f"model.num_moe_experts={63 - 63 % ranks}"  # the preset's 63 divide by 1, 3, 7 only
    variants = []
    for name, (preset, changes) in harness.models((COE, MOE)).items():
        settings = harness.settings(preset, experts, *changes)
        settings.train.global_batch_size *= ranks
        settings.parallel.expert_model_parallel_size = ranks
        variants.append(steps.build_step(name, settings, harness.device))
    steps.share_memory(variants)
    return variants


def long(harness: Harness) -> Outcome:
    """Time many consecutive steps of CoE-2(4/64), without validation or checkpoints."""
    variant = steps.build_step(COE, harness.settings(COE), harness.device)

    def run(lap: Callable[[str], None]) -> None:
        for _ in range(harness.steps):
            variant.trainer.step()
        lap("steps")

    timed = Variant(COE, run, tokens=variant.tokens * harness.steps)
    samples = interleave([timed], 1, 0, harness.device, harness.clock)
    seconds = Spread.of(samples[COE][TOTAL])
    outcome = Outcome(
        "long", f"{harness.steps:,} steps of {COE}, {_sizes(harness)}", samples=samples
    )
    outcome.header = ["steps", "seconds", "tokens/s"]
    rates = _tokens_per_second(samples, timed).text(0)
    outcome.rows = [[f"{harness.steps:,}", seconds.text(1), rates]]
    if harness.steps == 1000:
        outcome.figures["long"] = seconds
    _discard(variant.trainer.train_state.chunks)
    return outcome


def linear_kernels(harness: Harness) -> Outcome:
    """Time one linear layer per expert: the loop, `grouped_mm` and the dense product."""
    outcome = Outcome("kernels", "GFLOP/s of one linear layer per expert, forward and backward")
    outcome.header = ["experts x (inputs -> outputs), rows each", "loop", "grouped_mm", "dense"]
    dtype = torch.bfloat16 if harness.device.type == "cuda" else torch.float32
    for shape in kernels.SHAPES:
        variants = kernels.kernel_variants(shape, harness.device, dtype)
        samples = harness.time(variants)
        experts, inputs, outputs, rows = shape
        name = f"{experts} x ({inputs} -> {outputs}), {rows}"
        outcome.rows.append([name, *(rate(samples, variant).text(0) for variant in variants)])
        outcome.samples |= {f"{name} {variant.name}": samples[variant.name] for variant in variants}
    return outcome


def _steps(harness: Harness, benchmark: str, pair: tuple[str, str]) -> Outcome:
    variants: list[StepVariant] = [
        steps.build_step(name, harness.settings(preset, *changes), harness.device)
        for name, (preset, changes) in harness.models(pair).items()
    ]
    steps.share_memory(variants)
    timed = [variant.variant() for variant in variants]
    samples = harness.time(timed)
    last = timed[-1]
    outcome = Outcome(benchmark, f"Training step, {_sizes(harness)}", samples=samples)
    outcome.header = ["model", *(f"{part}, s" for part in (*PARTS, TOTAL)), "fastest, s"]
    outcome.header += ["tokens/s", "GFLOP/s", f"time / {last.name}", "of gradients", "FLOPs"]
    outcome.rows = [_step_row(samples, variant, last) for variant in timed]
    outcome.figures[benchmark] = ratio(samples, timed[0].name, last.name)
    outcome.figures[f"{benchmark} gradients"] = ratio(samples, timed[0].name, last.name, GRADIENTS)
    if harness.profiles:
        work = {variant.name: (variant.trainer.step, variant.calls()) for variant in variants}
        outcome.further.append(_phase_table(harness, work))
    _discard(variant.model for variant in variants)
    return outcome


def _step_row(samples: Samples, variant: Variant, last: Variant) -> list[str]:
    times = [Spread.of(samples[variant.name][part]).text() for part in (*PARTS, TOTAL)]
    compared = [ratio(samples, variant.name, last.name, part) for part in (TOTAL, GRADIENTS)]
    return [
        variant.name,
        *times,
        f"{min(samples[variant.name][TOTAL]):.3f}",
        _tokens_per_second(samples, variant).text(0),
        rate(samples, variant, GRADIENTS).text(0),
        *(spread.text() for spread in compared),
        f"{variant.flops / last.flops:.3f}",
    ]


def _pass_table(
    harness: Harness, benchmark: str, title: str, variants: Sequence[Variant], samples: Samples
) -> Outcome:
    """Tabulate seconds forward and backward, and the rate, of each variant."""
    outcome = Outcome(benchmark, f"{title}, {_sizes(harness)}", samples=samples)
    outcome.header = ["variant", "forward, s", "backward, s", "fastest, s", "GFLOP/s"]
    for variant in variants:
        times = [Spread.of(samples[variant.name][part]).text() for part in (FORWARD, BACKWARD)]
        fastest = f"{min(samples[variant.name][TOTAL]):.3f}"
        outcome.rows.append([variant.name, *times, fastest, rate(samples, variant).text(0)])
    return outcome


def _phase_table(
    harness: Harness, work: Mapping[str, tuple[Callable[[], object], Sequence[phases.Target]]]
) -> Outcome:
    """Tabulate the seconds of each phase, the least of several profiled runs."""
    found = {}
    for name, (run, calls) in work.items():
        profiles = [
            phases.measure_phases(run, calls, harness.device) for _ in range(harness.profiles)
        ]
        found[name] = phases.smallest(profiles)
    title = f"Phases: forward + backward, s, the least of {harness.profiles} profiled runs (wall)"
    outcome = Outcome("phases", title, ["phase", *found], details={"phases": found})
    for phase in phases.largest_first(found.values()):
        cells = [found[name].get(phase, (0.0, 0.0)) for name in found]
        outcome.rows.append([phase, *(f"{there:.3f} + {back:.3f}" for there, back in cells)])
    return outcome


def _stock_experts(harness: Harness, provider: CoEModelProvider, ours: PassVariant) -> PassVariant:
    """Build Megatron's `SequentialMLP` with the weights of our experts."""
    stock = layers.build_stock(provider, harness.device)
    stock.share_experts(ours.module.module)
    return layers.experts_variant(
        "SequentialMLP", stock.layer.experts, provider, harness.scale.tokens, harness.device
    )


def _agreement(ours: PassVariant, theirs: PassVariant) -> dict[str, float]:
    names = ours.name, theirs.name
    return check_agreement(names, ours.result(), theirs.result(), ours.xs[0].dtype)


def _rate_over(samples: Samples, variant: Variant, dense: Variant) -> Spread:
    """Return a variant's rate over the dense one's, formed within each round."""
    pairs = zip(samples[variant.name][TOTAL], samples[dense.name][TOTAL], strict=True)
    return Spread.of([variant.flops / ours / (dense.flops / theirs) for ours, theirs in pairs])


def _tokens_per_second(samples: Samples, variant: Variant) -> Spread:
    return Spread.of([variant.tokens / seconds for seconds in samples[variant.name][TOTAL]])


def _sizes(harness: Harness) -> str:
    scale = harness.scale
    layers = f"{scale.num_layers} layer" + "s" * (scale.num_layers > 1)
    tokens = f"T = {scale.tokens:,} ({scale.sequences} x {scale.seq_length})"
    return f"{tokens}, {layers}, V = {scale.vocab_size:,}"


def _discard(modules: Iterator[torch.nn.Module] | Sequence[torch.nn.Module]) -> None:
    """Free models.

    A dispatcher keeps tensors of its last pass, whose graph holds the model's gradient hooks, a
    cycle that Python's collector cannot see.
    """
    for module in modules:
        for part in module.modules():
            if isinstance(part, MoELayer):
                vars(part.token_dispatcher).clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
