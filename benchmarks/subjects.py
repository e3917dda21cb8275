"""What can be measured: each subject builds its arms, times them in turns and reports."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from benchmarks import head, kernels, layers, memory, phases, steps, transformers_baseline
from benchmarks.agreement import check_agreement
from benchmarks.communication import exposed_share
from benchmarks.host_syncs import count_synchronisations
from benchmarks.layers import BACKWARD, FORWARD, PassArm
from benchmarks.report import Outcome
from benchmarks.scale import Scale, preset_settings
from benchmarks.steps import GRADIENTS, PARTS, StepArm
from benchmarks.timing import TOTAL, Arm, Samples, Spread, interleave, rate, ratio
from megatron_coe.config.model_section import build_provider
from megatron_coe.config.run_config import Settings
from megatron_coe.distributed import setup
from megatron_coe.model.provider import CoEModelProvider

COE, MOE = "coe-2_4-64", "moe_8-64"
MATCHED_COE, MATCHED_MOE = "coe-2_3-64", "moe_7-64"


@dataclass(frozen=True)
class Bench:
    """What the subjects share: the machine, the sizes and how often to measure."""

    presets: Path
    """Folder of the paper's models."""
    scale: Scale
    device: torch.device
    rounds: int
    warmup: int
    clock: str
    profiles: int = 3
    """How many steps are profiled for the table of phases; 0: none is shown."""
    steps: int = 1000
    """Of the subject `long`."""
    variants: tuple[tuple[str, ...], ...] = ()
    """Settings to compare, each a tuple of `section.key=value`; empty: CoE with MoE."""
    changes: tuple[str, ...] = ()
    """`section.key=value` for every arm."""

    def check(self) -> None:
        """Raises: ValueError, OSError: no such preset, or what is laid over it cannot be."""
        for preset, changes in self.models((COE, MOE)).values():
            build_provider(self.settings(preset, *changes), self.device)

    def settings(self, preset: str, *changes: str) -> Settings:
        return preset_settings(self.presets / f"{preset}.yaml", self.scale, *changes, *self.changes)

    def provider(self, preset: str, *changes: str) -> CoEModelProvider:
        """Of a layer by itself: its balance losses weigh as they are."""
        settings = self.settings(preset, *changes)
        setup.seed_everything(settings.train.seed)
        provider = build_provider(settings, self.device)
        return replace(provider, calculate_per_token_loss=False)

    def time(self, arms: Sequence[Arm]) -> Samples:
        return interleave(arms, self.rounds, self.warmup, self.device, self.clock)

    def models(self, pair: tuple[str, str]) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Name -> (preset, changes) of the arms: the pair, or variants of its first."""
        if self.variants:
            return {f"{pair[0]} {' '.join(v)}": (pair[0], v) for v in self.variants}
        return {preset: (preset, ()) for preset in pair}


def experts(bench: Bench) -> Outcome:
    """Routed experts, forward and backward, beside Megatron's and the dense ceiling."""
    models = bench.models((COE, MOE))
    arms: list[PassArm] = []
    providers = []
    for name, (preset, changes) in models.items():
        provider = bench.provider(preset, *changes)
        experts = layers.build_layer(provider, bench.device).experts
        arms.append(layers.experts_arm(name, experts, provider, bench.scale.tokens, bench.device))
        providers.append(provider)
    stock = _stock_experts(bench, providers[0], arms[0])
    differences = _agreement(arms[0], stock, providers[0])
    timed = [arm.arm() for arm in (*arms, stock)]
    dense = layers.dense_arm(providers[0], bench.scale.tokens, bench.device)
    samples = bench.time([*timed, dense])
    outcome = _pass_table(bench, "experts", "Routed experts", [*timed, dense], samples)
    outcome.header.append("rate / dense")
    for arm, row in zip([*timed, dense], outcome.rows, strict=True):
        row.append(_rate_over(samples, arm, dense).text())
    outcome.figures["experts"] = _rate_over(samples, timed[0], dense)
    outcome.details["differences"] = differences
    _discard(arm.module for arm in (*arms, stock))
    return outcome


def layer(bench: Bench) -> Outcome:
    """The whole layer: CoE, MoE, and Megatron's own called C times."""
    arms: list[PassArm] = []
    providers: list[CoEModelProvider] = []
    batch = None
    for name, (preset, changes) in bench.models((COE, MOE)).items():
        provider = bench.provider(preset, *changes)
        batch = batch or layers.random_batch(provider, bench.scale.sequences, bench.device)
        module = layers.build_layer(provider, bench.device)
        if not arms:
            stock = layers.build_stock(provider, bench.device)
            stock.share_weights(module)
        arms.append(layers.layer_arm(name, module, provider, batch))
        providers.append(provider)
    arms.append(layers.layer_arm("stock MoELayer, C times", stock, providers[0], batch))
    differences = _agreement(arms[0], arms[-1], providers[0])
    timed = [arm.arm() for arm in arms]
    samples = bench.time(timed)
    outcome = _pass_table(bench, "layer", "One layer", timed, samples)
    outcome.header.append(f"time / {timed[0].name}")
    for arm, row in zip(timed, outcome.rows, strict=True):
        row.append(ratio(samples, arm.name, timed[0].name).text())
    outcome.figures["layer"] = ratio(samples, timed[-1].name, timed[0].name)
    if not bench.variants:
        outcome.figures["layer coe / moe"] = ratio(samples, timed[0].name, timed[1].name)
    outcome.details["differences"] = differences
    if bench.profiles:
        work = {arm.name: (arm.work, list(phases.targets(arm.module))) for arm in arms}
        outcome.further.append(_phase_table(bench, work))
    _discard(arm.module for arm in arms)
    return outcome


def step(bench: Bench) -> Outcome:
    """A whole training step: CoE-2(4/64) and MoE(8/64)."""
    return _steps(bench, "step", (COE, MOE))


def matched(bench: Bench) -> Outcome:
    """A whole training step of the pair with exactly equal expert passes."""
    return _steps(bench, "matched", (MATCHED_COE, MATCHED_MOE))


def output_head(bench: Bench) -> Outcome:
    """The output head with its loss, which is the same for CoE and MoE."""
    subject = head.random_head(bench.provider(MOE), bench.scale.tokens, bench.device)
    arms = subject.arms()
    names = head.MEGATRON, head.FUSED
    differences = check_agreement(names, *(subject.result(name) for name in names), subject.x.dtype)
    samples = bench.time(arms)
    outcome = _pass_table(bench, "head", "Output head and loss", arms, samples)
    outcome.header.append(f"time / {head.PRODUCTS}")
    for arm, row in zip(arms, outcome.rows, strict=True):
        row.append(ratio(samples, arm.name, head.PRODUCTS).text())
    outcome.details["differences"] = differences
    return outcome


def transformers(bench: Bench) -> Outcome:
    """Forward and backward of MoE(8/64) here and in transformers, with the same weights."""
    pair = transformers_baseline.build_pair(
        bench.settings(MOE, *transformers_baseline.CHANGES), bench.device
    )
    arms = pair.arms()
    differences = check_agreement(
        (arms[0].name, arms[1].name), *pair.results(), pair.provider.params_dtype
    )
    samples = bench.time(arms)
    title = "MoE(8/64), a step without the update, transformers with `grouped_mm`"
    outcome = _pass_table(bench, "transformers", title, arms, samples)
    outcome.header.append("tokens/s")
    for arm, row in zip(arms, outcome.rows, strict=True):
        row.append(_tokens_per_second(samples, arm).text(0))
    outcome.figures["transformers"] = ratio(samples, arms[1].name, arms[0].name)
    outcome.details["differences"] = differences
    _discard([pair.ours])
    return outcome


def peak_memory(bench: Bench) -> Outcome:
    """Bytes held and bytes passing through in a training step, one model after the other."""
    outcome = Outcome("memory", f"Memory of a training step, {_sizes(bench)}")
    outcome.header = ["model", "held", *(f"passing, {part}" for part in PARTS), "peak"]
    found = {}
    for name, (preset, changes) in bench.models((COE, MOE)).items():
        arm = steps.build_step(name, bench.settings(preset, *changes), bench.device)
        arm.trainer.step()
        held = memory.held_by(arm.trainer.train_state)
        found[name] = memory.footprint(held, arm.arm().run, bench.device)
        passing = [found[name].passing[part] for part in PARTS]
        figures = (found[name].held, *passing, found[name].peak)
        outcome.rows.append([name, *(f"{value / 2**20:,.0f} MiB" for value in figures)])
        outcome.details[name] = dict(zip(outcome.header[1:], figures, strict=True))
        _discard(arm.trainer.train_state.chunks)
        del arm, held
    if not bench.variants:
        ours, theirs = found.values()
        passing = ours.passing[GRADIENTS] / theirs.passing[GRADIENTS]
        outcome.figures["memory"] = Spread.of([ours.peak / theirs.peak])
        outcome.figures["memory passing"] = Spread.of([passing])
    return outcome


def synchronisations(bench: Bench) -> Outcome:
    """How often a training step makes the host wait for the device."""
    how = "waits" if bench.device.type == "cuda" else "calls that would wait on a GPU"
    outcome = Outcome("synchronisations", f"Synchronisations of a training step ({how})")
    outcome.header = ["model", "in all", "by place"]
    for name, (preset, changes) in bench.models((COE, MOE)).items():
        arm = steps.build_step(name, bench.settings(preset, *changes), bench.device)
        arm.trainer.step()
        counts = count_synchronisations(lambda arm=arm: arm.trainer.step(), bench.device)
        places = ", ".join(f"{place} {count}" for place, count in counts.most_common())
        outcome.rows.append([name, str(counts.total()), places])
        outcome.figures.setdefault("synchronisations", Spread.of([counts.total()]))
        _discard(arm.trainer.train_state.chunks)
    return outcome


def parallel(bench: Bench) -> Outcome:
    """The share of a step that this rank waits for others, experts divided over all ranks."""
    ranks = torch.distributed.get_world_size()
    if ranks < 2:
        raise ValueError("--what parallel needs several ranks: start it with torchrun")
    layout = (f"model.num_moe_experts={63 - 63 % ranks}",)  # the preset's 63 divide by 1, 3, 7 only
    outcome = Outcome("parallel", f"Experts over {ranks} ranks, {_sizes(bench)}")
    outcome.header = ["model", "seconds per step", "exposed share of communication"]
    arms: list[StepArm] = []
    for name, (preset, changes) in bench.models((COE, MOE)).items():
        settings = bench.settings(preset, *layout, *changes)
        settings.train.global_batch_size *= ranks
        settings.parallel.expert_model_parallel_size = ranks
        arms.append(steps.build_step(name, settings, bench.device))
    steps.share_memory(arms)
    outcome.samples = bench.time([arm.arm() for arm in arms])
    shares: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for _ in range(bench.rounds):
        for arm in arms:
            shares[arm.name].append(exposed_share(arm.trainer.step, bench.device))
    for arm in arms:
        seconds = Spread.of(outcome.samples[arm.name][TOTAL])
        outcome.rows.append([arm.name, seconds.text(), Spread.of(shares[arm.name]).text()])
    outcome.figures["parallel"] = Spread.of(shares[arms[0].name])
    _discard(chunk for arm in arms for chunk in arm.trainer.train_state.chunks)
    return outcome


def long(bench: Bench) -> Outcome:
    """Many steps of CoE-2(4/64) in a row, without validation or checkpoints."""
    arm = steps.build_step(COE, bench.settings(COE), bench.device)

    def run(lap: Callable[[str], None]) -> None:
        for _ in range(bench.steps):
            arm.trainer.step()
        lap("steps")

    timed = Arm(COE, run, tokens=arm.tokens * bench.steps)
    samples = interleave([timed], 1, 0, bench.device, bench.clock)
    seconds = Spread.of(samples[COE][TOTAL])
    outcome = Outcome("long", f"{bench.steps:,} steps of {COE}, {_sizes(bench)}", samples=samples)
    outcome.header = ["steps", "seconds", "tokens/s"]
    rates = _tokens_per_second(samples, timed).text(0)
    outcome.rows = [[f"{bench.steps:,}", seconds.text(1), rates]]
    if bench.steps == 1000:
        outcome.figures["long"] = seconds
    _discard(arm.trainer.train_state.chunks)
    return outcome


def linear_kernels(bench: Bench) -> Outcome:
    """One linear layer per expert: the loop, `grouped_mm` and the dense product."""
    outcome = Outcome("kernels", "GFLOP/s of one linear layer per expert, forward and backward")
    outcome.header = ["experts x (inputs -> outputs), rows each", "loop", "grouped_mm", "dense"]
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    for shape in kernels.SHAPES:
        arms = kernels.kernel_arms(shape, bench.device, dtype)
        samples = bench.time(arms)
        experts, inputs, outputs, rows = shape
        name = f"{experts} x ({inputs} -> {outputs}), {rows}"
        outcome.rows.append([name, *(rate(samples, arm).text(0) for arm in arms)])
        outcome.samples |= {f"{name} {arm.name}": samples[arm.name] for arm in arms}
    return outcome


SUBJECTS: dict[str, Callable[[Bench], Outcome]] = {
    "kernels": linear_kernels,
    "experts": experts,
    "layer": layer,
    "head": output_head,
    "step": step,
    "matched": matched,
    "transformers": transformers,
    "memory": peak_memory,
    "synchronisations": synchronisations,
    "parallel": parallel,
    "long": long,
}

ALL = tuple(name for name in SUBJECTS if name not in ("parallel", "long"))
"""What `--what all` measures: what one process can, in minutes."""


def _steps(bench: Bench, subject: str, pair: tuple[str, str]) -> Outcome:
    arms: list[StepArm] = [
        steps.build_step(name, bench.settings(preset, *changes), bench.device)
        for name, (preset, changes) in bench.models(pair).items()
    ]
    steps.share_memory(arms)
    timed = [arm.arm() for arm in arms]
    samples = bench.time(timed)
    last = timed[-1]
    outcome = Outcome(subject, f"Training step, {_sizes(bench)}", samples=samples)
    parts = (*PARTS, TOTAL)
    outcome.header = ["model", *(f"{part}, s" for part in parts), "fastest, s"]
    outcome.header += ["tokens/s", "GFLOP/s", f"time / {last.name}", "of gradients", "FLOPs"]
    for arm in timed:
        times = [Spread.of(samples[arm.name][part]).text() for part in parts]
        compared = [ratio(samples, arm.name, last.name, part) for part in (TOTAL, GRADIENTS)]
        outcome.rows.append(
            [
                arm.name,
                *times,
                f"{min(samples[arm.name][TOTAL]):.3f}",
                _tokens_per_second(samples, arm).text(0),
                rate(samples, arm, GRADIENTS).text(0),
                *(spread.text() for spread in compared),
                f"{arm.flops / last.flops:.3f}",
            ]
        )
    outcome.figures[subject] = ratio(samples, timed[0].name, last.name)
    outcome.figures[f"{subject} gradients"] = ratio(samples, timed[0].name, last.name, GRADIENTS)
    if bench.profiles:
        work = {arm.name: (arm.trainer.step, arm.calls()) for arm in arms}
        outcome.further.append(_phase_table(bench, work))
    _discard(arm.model for arm in arms)
    return outcome


def _pass_table(
    bench: Bench, subject: str, title: str, arms: Sequence[Arm], samples: Samples
) -> Outcome:
    """Seconds forward and backward, and the rate, of each arm."""
    outcome = Outcome(subject, f"{title}, {_sizes(bench)}", samples=samples)
    outcome.header = ["arm", "forward, s", "backward, s", "fastest, s", "GFLOP/s"]
    for arm in arms:
        times = [Spread.of(samples[arm.name][part]).text() for part in (FORWARD, BACKWARD)]
        fastest = f"{min(samples[arm.name][TOTAL]):.3f}"
        outcome.rows.append([arm.name, *times, fastest, rate(samples, arm).text(0)])
    return outcome


def _phase_table(
    bench: Bench, work: dict[str, tuple[Callable[[], None], Sequence[phases.Target]]]
) -> Outcome:
    """Seconds of each phase, the least of several profiled runs."""
    found = {}
    for name, (run, calls) in work.items():
        profiles = [phases.measure_phases(run, calls, bench.device) for _ in range(bench.profiles)]
        found[name] = phases.smallest(profiles)
    title = f"Phases: forward + backward, s, the least of {bench.profiles} profiled runs (wall)"
    outcome = Outcome("phases", title, ["phase", *found], details={"phases": found})
    for phase in phases.largest_first(found.values()):
        cells = [found[name].get(phase, (0.0, 0.0)) for name in found]
        outcome.rows.append([phase, *(f"{there:.3f} + {back:.3f}" for there, back in cells)])
    return outcome


def _stock_experts(bench: Bench, provider: CoEModelProvider, ours: PassArm) -> PassArm:
    """Megatron's `SequentialMLP` with the weights of our experts."""
    stock = layers.build_stock(provider, bench.device)
    stock.share_experts(ours.module.module)
    return layers.experts_arm(
        "SequentialMLP", stock.layer.experts, provider, bench.scale.tokens, bench.device
    )


def _agreement(ours: PassArm, theirs: PassArm, provider: CoEModelProvider) -> dict[str, float]:
    names = ours.name, theirs.name
    return check_agreement(names, ours.result(), theirs.result(), provider.params_dtype)


def _rate_over(samples: Samples, arm: Arm, dense: Arm) -> Spread:
    """An arm's rate over the dense one's, formed within each round."""
    pairs = zip(samples[arm.name][TOTAL], samples[dense.name][TOTAL], strict=True)
    return Spread.of([arm.flops / ours / (dense.flops / theirs) for ours, theirs in pairs])


def _tokens_per_second(samples: Samples, arm: Arm) -> Spread:
    return Spread.of([arm.tokens / seconds for seconds in samples[arm.name][TOTAL]])


def _sizes(bench: Bench) -> str:
    scale = bench.scale
    layers = f"{scale.num_layers} layer" + "s" * (scale.num_layers > 1)
    tokens = f"T = {scale.tokens:,} ({scale.sequences} x {scale.seq_length})"
    return f"{tokens}, {layers}, V = {scale.vocab_size:,}"


def _discard(modules: Iterator[torch.nn.Module] | Sequence[torch.nn.Module]) -> None:
    """Let models go: a dispatcher remembers tensors of its last pass, and by their graph the
    model's gradient hooks, a circle that Python's collector cannot see."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, MoELayer):
                vars(part.token_dispatcher).clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
