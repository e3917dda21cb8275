"""The paper's experiments, and `fair`: the models compared, and the claims about them.

Models are the presets of examples/paper/, at the paper's size or made smaller by a `Scale`.
CoE-C(K/N): C iterations, K routed experts per token in each, N experts, shared ones included.
Source: arXiv 2506.18945, section 4 and its appendix on longer training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from experiments.claims import Claim, Contrast, MemorySaving, Mixed, lower, no_worse


@dataclass(frozen=True)
class Variant:
    """A model of an experiment.

    Attributes:
        name: of its preset examples/paper/NAME.yaml, and in tables.
        title: in the paper's notation.
        longer: the preset of the same model for longer runs, used at the paper's size; runs of
            smaller scales are equally long.
    """

    name: str
    title: str
    longer: str | None = None


@dataclass(frozen=True)
class Experiment:
    """Variants and claims of an experiment.

    Attributes:
        name: on the command line.
        claim: the paper's, in a sentence.
        variants: the baseline first.
        claims: the parts of the claim, and controls.
        reported: the paper's measurements, by variant.
        tuned: whether each variant gets its own learning rate (`experiments.tuned`).
    """

    name: str
    claim: str
    variants: tuple[Variant, ...]
    claims: tuple[Claim, ...]
    reported: dict[str, str] = field(default_factory=dict)
    tuned: bool = False

    def restricted(self, names: Sequence[str]) -> Experiment:
        """Return the experiment of these variants alone, with the claims about them.

        Raises:
            ValueError: a variant is unknown, or no claim is left.
        """
        known = [variant.name for variant in self.variants]
        for name in names:
            if name not in known:
                raise ValueError(f"--variants {name}: {self.name} has {', '.join(known)}")
        claims = tuple(claim for claim in self.claims if claim.variants <= set(names))
        if all(claim.control for claim in claims):
            raise ValueError(f"--variants {' '.join(names)}: no claim is about these alone")
        variants = tuple(variant for variant in self.variants if variant.name in names)
        claim = f"Of {self.name}, what is claimed of {', '.join(v.title for v in variants)} alone."
        return replace(self, claim=claim, variants=variants, claims=claims)


MOE_8 = Variant("moe_8-64", "MoE(8/64)")
COE_4 = Variant("coe-2_4-64", "CoE-2(4/64)")
COE_8 = Variant("coe-2_8-64", "CoE-2(8/64)")

MAIN = Experiment(
    "main",
    "At equal numbers of experts and about equal work, CoE-2(4/64) reaches a lower validation loss "
    "than MoE(8/64).",
    (
        MOE_8,
        COE_4,
        Variant("moe_7-64", "MoE(7/64)"),
        Variant("coe-2_3-64", "CoE-2(3/64)"),
    ),
    (
        lower("CoE-2(4/64) is better than MoE(8/64).", "coe-2_4-64", "moe_8-64"),
        lower(
            "With as many expert passes, 2 * (3 + 1) and 7 + 1, CoE-2 is better.",
            "coe-2_3-64",
            "moe_7-64",
            control=True,
        ),
    ),
    {"moe_8-64": "1.20", "coe-2_4-64": "1.12"},
)

COMPUTE = Experiment(
    "compute",
    "Twice the iterations do as much as three times the experts: CoE-2(8/64) matches MoE(24/64).",
    (
        Variant("moe_24-64", "MoE(24/64)"),
        Variant("moe_16-64", "MoE(16/64)"),
        COE_8,
    ),
    (
        no_worse("CoE-2(8/64) is no worse than MoE(24/64).", "coe-2_8-64", "moe_24-64"),
        lower(
            "At about equal work, CoE-2(8/64) is better than MoE(16/64).",
            "coe-2_8-64",
            "moe_16-64",
        ),
    ),
)

MEMORY = Experiment(
    "memory",
    "CoE-2(4/48) reaches the loss of MoE(8/64) with 17.6% less memory.",
    (
        MOE_8,
        Variant("moe_8-48", "MoE(8/48)"),
        Variant("coe-2_4-48", "CoE-2(4/48)"),
    ),
    (
        no_worse("CoE-2(4/48) is no worse than MoE(8/64).", "coe-2_4-48", "moe_8-64"),
        MemorySaving("It takes 17.6% less memory.", "coe-2_4-48", "moe_8-64", 0.176),
        lower(
            "With as few experts, CoE-2(4/48) is better than MoE(8/48).",
            "coe-2_4-48",
            "moe_8-48",
            control=True,
        ),
    ),
)

LAYERS = Experiment(
    "layers",
    "CoE-2(8/64) matches MoE(8/64) of three times its layers with 42% less memory. (The authors' "
    "own figures give 59% against three times the layers, and 42% against twice.)",
    (
        Variant("moe_8-64_12-layers", "MoE(8/64), 3 x layers"),
        Variant("moe_8-64_8-layers", "MoE(8/64), 2 x layers"),
        COE_8,
    ),
    (
        no_worse("It is no worse than three times the layers.", "coe-2_8-64", "moe_8-64_12-layers"),
        MemorySaving(
            "It takes 42% less memory than three times the layers.",
            "coe-2_8-64",
            "moe_8-64_12-layers",
            0.42,
        ),
        no_worse(
            "It is no worse than twice the layers.",
            "coe-2_8-64",
            "moe_8-64_8-layers",
            control=True,
        ),
        MemorySaving(
            "It takes 42% less memory than twice the layers.",
            "coe-2_8-64",
            "moe_8-64_8-layers",
            0.42,
            control=True,
        ),
    ),
    {"coe-2_8-64": "11.70 GB", "moe_8-64_8-layers": "20.21 GB", "moe_8-64_12-layers": "28.71 GB"},
)

ABLATION = Experiment(
    "ablation",
    "The gain needs both the inner residual and a router for each iteration.",
    (
        COE_8,
        Variant("coe-2_8-64_outer", "CoE-2(8/64), residual outside"),
        Variant("coe-2_8-64_shared-gate", "CoE-2(8/64), one router"),
        Variant("coe-2_8-64_inner-outer", "CoE-2(8/64), residual inside and outside"),
        Variant("coe-2_8-64_shared-gate_inner-outer", "CoE-2(8/64), one router, both residuals"),
        MOE_8,
    ),
    (
        lower("The residual inside is better than outside.", "coe-2_8-64", "coe-2_8-64_outer"),
        lower(
            "A router for each iteration is better than one.",
            "coe-2_8-64",
            "coe-2_8-64_shared-gate",
        ),
        no_worse(
            "With the residual outside, it gains nothing over MoE(8/64).",
            "moe_8-64",
            "coe-2_8-64_outer",
            control=True,
        ),
        lower(
            "As the authors' scripts ran it: inside is better than inside and outside.",
            "coe-2_8-64",
            "coe-2_8-64_inner-outer",
            control=True,
        ),
        lower(
            "As the authors' scripts ran it: a router for each is better than one router with both "
            "residuals.",
            "coe-2_8-64",
            "coe-2_8-64_shared-gate_inner-outer",
            control=True,
        ),
    ),
    {"coe-2_8-64_outer": "1.21", "coe-2_8-64_shared-gate": "about 1.5"},
)

RESIDUAL = Experiment(
    "residual",
    "Of the ways to join iterations, `inner` is best, `addinit` next, `outer` last.",
    (
        COE_4,
        Variant("coe-2_4-64_addinit", "CoE-2(4/64), from x(0)"),
        Variant("coe-2_4-64_outer", "CoE-2(4/64), residual outside"),
        MOE_8,
        Variant("moe_8-64_outer", "MoE(8/64), residual outside"),
    ),
    (
        lower("`inner` is better than `outer`.", "coe-2_4-64", "coe-2_4-64_outer"),
        lower("`inner` is better than `addinit`.", "coe-2_4-64", "coe-2_4-64_addinit"),
        lower("`addinit` is better than `outer`.", "coe-2_4-64_addinit", "coe-2_4-64_outer"),
        lower(
            "It is not the iterations that make the difference: `inner` is better with one "
            "iteration, too.",
            "moe_8-64",
            "moe_8-64_outer",
            control=True,
        ),
        lower(
            "With the residual outside, as in a usual layer, CoE-2(4/64) is better than MoE(8/64).",
            "coe-2_4-64_outer",
            "moe_8-64_outer",
            control=True,
        ),
    ),
    {"coe-2_4-64": "1.12", "coe-2_4-64_addinit": "1.18", "coe-2_4-64_outer": "1.21"},
)

DENSE = Experiment(
    "dense",
    "Where all experts are active, a second iteration gains nothing.",
    (
        Variant("moe_8-8", "MoE(8/8), none shared"),
        Variant("coe-2_8-8", "CoE-2(8/8), none shared"),
        Variant("moe_7-8", "MoE(7/8)"),
        Variant("coe-2_7-8", "CoE-2(7/8)"),
    ),
    (
        no_worse("MoE(8/8) is no worse than CoE-2(8/8).", "moe_8-8", "coe-2_8-8"),
        no_worse(
            "The other reading of 8 experts, 7 routed and a shared one: MoE is no worse.",
            "moe_7-8",
            "coe-2_7-8",
        ),
    ),
)

ITERATIONS = Experiment(
    "iterations",
    "A second iteration helps; a third and a fourth give less, or are unstable.",
    (
        Variant("moe_8-64", "CoE-1(8/64)", longer="coe-1_8-64_10k"),
        Variant("coe-2_8-64", "CoE-2(8/64)", longer="coe-2_8-64_10k"),
        Variant("coe-3_8-64", "CoE-3(8/64)", longer="coe-3_8-64_10k"),
        Variant("coe-4_8-64", "CoE-4(8/64)", longer="coe-4_8-64_10k"),
    ),
    (
        lower("Two iterations are better than one.", "coe-2_8-64", "moe_8-64"),
        Contrast(
            "The third gains less than the second did.",
            {"coe-2_8-64": 2, "moe_8-64": -1, "coe-3_8-64": -1},
        ),
        Contrast(
            "The fourth gains less than the second did.",
            {"coe-2_8-64": 1, "moe_8-64": -1, "coe-3_8-64": 1, "coe-4_8-64": -1},
        ),
    ),
)

SHARED = Experiment(
    "shared",
    "What the shared expert does is mixed: it helps one of MoE and CoE-2 and hurts the other.",
    (
        MOE_8,
        Variant("moe_8-64_no-shared", "MoE(8/64), none shared"),
        COE_4,
        Variant("coe-2_4-64_no-shared", "CoE-2(4/64), none shared"),
    ),
    (
        Mixed(
            "The shared expert helps one and hurts the other.",
            lower("", "moe_8-64", "moe_8-64_no-shared"),
            lower("", "coe-2_4-64", "coe-2_4-64_no-shared"),
        ),
        lower(
            "MoE(8/64) is better with a shared expert.",
            "moe_8-64",
            "moe_8-64_no-shared",
            control=True,
        ),
        lower(
            "CoE-2(4/64) is better with a shared expert.",
            "coe-2_4-64",
            "coe-2_4-64_no-shared",
            control=True,
        ),
    ),
)

FAIR = Experiment(
    "fair",
    "Against the standard MoE, h + f(norm(h)), each at its own learning rate, the chain pays: at "
    "equal parameters, at equal work, and at less memory.",
    (
        Variant("moe_8-64_outer", "MoE(8/64), standard"),
        COE_4,
        Variant("moe_7-64_outer", "MoE(7/64), standard"),
        Variant("coe-2_3-64", "CoE-2(3/64)"),
        Variant("coe-2_4-48", "CoE-2(4/48)"),
        MOE_8,
        Variant("moe_7-64", "MoE(7/64)"),
    ),
    (
        lower(
            "Equal parameters: CoE-2(4/64) is better than the standard MoE(8/64).",
            "coe-2_4-64",
            "moe_8-64_outer",
        ),
        lower(
            "Equal work, 2 * (3 + 1) and 7 + 1 expert passes: CoE-2(3/64) is better than the "
            "standard MoE(7/64).",
            "coe-2_3-64",
            "moe_7-64_outer",
        ),
        no_worse(
            "Less memory: CoE-2(4/48) is no worse than the standard MoE(8/64).",
            "coe-2_4-48",
            "moe_8-64_outer",
        ),
        MemorySaving("It takes 17.6% less memory.", "coe-2_4-48", "moe_8-64_outer", 0.176),
        lower(
            "The paper's baseline, equal parameters: CoE-2(4/64) is better than MoE(8/64).",
            "coe-2_4-64",
            "moe_8-64",
            control=True,
        ),
        lower(
            "The paper's baseline, equal work: CoE-2(3/64) is better than MoE(7/64).",
            "coe-2_3-64",
            "moe_7-64",
            control=True,
        ),
        no_worse(
            "The paper's baseline, less memory: CoE-2(4/48) is no worse than MoE(8/64).",
            "coe-2_4-48",
            "moe_8-64",
            control=True,
        ),
        lower(
            "The standard MoE(8/64) is better than the paper's baseline.",
            "moe_8-64_outer",
            "moe_8-64",
            control=True,
        ),
    ),
    tuned=True,
)

EXPERIMENTS = {
    experiment.name: experiment
    for experiment in [
        MAIN,
        COMPUTE,
        MEMORY,
        LAYERS,
        ABLATION,
        RESIDUAL,
        DENSE,
        ITERATIONS,
        SHARED,
        FAIR,
    ]
}
