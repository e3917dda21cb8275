"""Settings: what is read, what wins, and how a mistake is answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_coe.config.loader import load_settings
from megatron_coe.config.run_config import Settings, TrainSettings, held_out_sets
from megatron_coe.config.validation import check_layout, check_values, num_microbatches


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_settings(path, overrides)
    return str(caught.value)


def test_later_files_and_overrides_win(tmp_path):
    write(tmp_path, "base.yaml", "train: {steps: 7, lr: 1e-3}\nmodel: {num_layers: 4, a: 1}")
    write(tmp_path, "sub/middle.yaml", "extends: ../base.yaml\ntrain: {steps: 8, seed: 5}")
    top = write(tmp_path, "top.yaml", "extends: sub/middle.yaml\nmodel: {num_layers: 6}")
    settings = load_settings(top, ["train.seed=9", "model.moe_layer_freq=[0, 1]", "data.train=[x]"])
    assert (settings.train.steps, settings.train.lr, settings.train.seed) == (8, 1e-3, 9)
    assert settings.model == {"num_layers": 6, "a": 1, "moe_layer_freq": [0, 1]}
    assert settings.data.train == ["x"]
    assert settings.train.micro_batch_size == Settings().train.micro_batch_size


def test_folders_follow_the_name_of_the_file_unless_given(tmp_path):
    path = write(tmp_path, "mine.yaml", "{}")
    settings = load_settings(path)
    assert settings.log.dir == "runs/mine"
    assert settings.checkpoint.save == "runs/mine/checkpoints"
    moved = load_settings(path, ["log.dir=elsewhere", "checkpoint.save=null"])
    assert (moved.log.dir, moved.checkpoint.save) == ("elsewhere", None)


def test_saved_settings_read_back_the_same(tmp_path):
    path = write(tmp_path, "a.yaml", "model: {moe_layer_freq: [0, 1], q_lora_rank: null, x: 1e-6}")
    overrides = ["log.profile_steps=[2, 3]", "data.train_weights=[1, 2.5]"]
    settings = load_settings(path, [*overrides, 'train.lr_mult={"*.router.*": 0.1, "b": 2}'])
    assert list(settings.train.lr_mult.items()) == [("*.router.*", 0.1), ("b", 2.0)]
    again = load_settings(write(tmp_path, "b.yaml", settings.to_yaml()))
    assert again == settings


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=1", "unknown key 'train.stepz'; did you mean 'steps'?"),
        ("trane.steps=1", "unknown key 'trane'; did you mean 'train'?"),
        ("parallel.zzz=1", "unknown key 'parallel.zzz'"),
        ("train.optimizer_cpu_offload=true", "'train.optimizer_cpu_offload' is not offered: "),
        ("train.steps=many", "train.steps: Value 'many' of type 'str' could not be converted"),
        ("train.steps=1.5", "train.steps: Value '1.5' of type 'float' could not be converted"),
        ("train.lr=true", "train.lr: Value 'True' of type 'bool' could not be converted"),
        ("train.seed=null", "train.seed: Incompatible value 'None' for field of type 'int'"),
        ("data.train=x", "data.train: Invalid value assigned"),
        ("train.steps.x=3", "train.steps: Value"),
        ("train=3", "must have the form section.key=value"),
        ("train.steps", "must have the form section.key=value"),
        ("model.x=[1", "override 'model.x=[1'"),
    ],
)
def test_a_wrong_override_is_named(tmp_path, override, expected):
    message = refused(write(tmp_path, "a.yaml", "{}"), override)
    assert message.startswith(f"override {override!r}: ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {steps: 1, stpes: 2}", "unknown key 'train.stpes'; did you mean 'steps'?"),
        ("train: {steps: [1]}", "train.steps: Value"),
        ("train: 3", "Merge error"),
        ("model: 3", "model: Cannot assign int"),
        ("- 1", "must hold sections"),
        ("train: {steps: 1", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("extends: [a, b]", "'extends' must be the path of one file"),
        ("checkpoint: {save: '${log.nowhere}/x'}", "Interpolation key"),
        ("train: !!python/object/apply:os.system ['true']", "refused by OmegaConf"),
        ("[" * 2_000, "nested too deep"),
        ("17", "must hold sections"),
        ("log: {dir: '${oc.env:HOME}'}", "log.dir='${oc.env:HOME}': only other settings"),
        ("log: {dir: '${${log.wandb_name}:HOME}'}", "only other settings"),
        ("log: {dir: '${log.dir}/x'}", "Recursive interpolation"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, expected):
    path = write(tmp_path, "a.yaml", text)
    message = refused(path)
    assert message.startswith(f"{path}: ")
    assert expected in message


def test_more_values_than_omegaconf_takes_are_not_called_invalid(tmp_path):
    """It reads 10,000 nodes, aliases counted as often as they stand."""
    many = "model: {x: [" + "1, " * 10_000 + "]}"
    aliases = "model: {a: &a [" + "1, " * 500 + "], b: [" + "*a, " * 50 + "]}"
    for text in (many, aliases):
        message = refused(write(tmp_path, "a.yaml", text))
        assert "refused by OmegaConf: YAML" in message
        assert "not valid" not in message
    few = "model: {x: [" + "1, " * 9_000 + "]}"
    assert len(load_settings(write(tmp_path, "a.yaml", few)).model["x"]) == 9_000


def test_the_file_at_fault_is_named_not_the_one_that_extends_it(tmp_path):
    base = write(tmp_path, "base.yaml", "train: {stepz: 1}")
    top = write(tmp_path, "top.yaml", "extends: base.yaml")
    assert refused(top).startswith(f"{base}: ")


def test_a_circle_of_extends_is_refused(tmp_path):
    first = write(tmp_path, "a.yaml", "extends: b.yaml")
    write(tmp_path, "b.yaml", "extends: ./a.yaml")
    assert "goes round in a circle" in refused(first)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"gone\.yaml"):
        load_settings(tmp_path / "gone.yaml")
    with pytest.raises(OSError, match=r"gone\.yaml"):
        load_settings(write(tmp_path, "a.yaml", "extends: gone.yaml"))


@pytest.mark.parametrize(
    ("section", "name", "value", "expected"),
    [
        ("train", "steps", 0, "train.steps=0: must be greater than 0"),
        ("train", "exit_step", 0, "train.exit_step=0: must be greater than 0"),
        ("train", "micro_batch_size", -1, "train.micro_batch_size=-1"),
        ("train", "lr", float("nan"), "train.lr=nan: must be a finite number"),
        ("train", "weight_decay", float("inf"), "train.weight_decay=inf: must be a finite number"),
        ("train", "min_lr", 1.0, "train.min_lr=1.0 must not exceed train.lr"),
        ("train", "adam_beta2", 1.0, r"train.adam_beta2=1.0: must be in \[0, 1\)"),
        ("train", "lr_mult", {"a": 0.0}, "must be a mapping to values greater than 0"),
        ("train", "lr_warmup_fraction", 1.0, "train.lr_warmup_fraction=1.0"),
        ("train", "lr_warmup_steps", -1, "train.lr_warmup_steps=-1: must be 0 or more"),
        ("train", "lr_warmup_steps", 1000, "train.lr_warmup_steps=1000 must be less than train.st"),
        ("train", "lr_decay_style", "WSD", "=WSD, without a length: set train.lr_wsd_decay"),
        ("train", "lr_wsd_decay_steps", 3, "=constant, train.lr_wsd_decay_steps=3: set"),
        ("train", "lr_wsd_decay_steps", 0, "train.lr_wsd_decay_steps=0: must be greater than 0"),
        ("train", "lr_wsd_decay_style", "sqrt", "'exponential', 'linear', 'cosine', 'minus_sqrt'"),
        ("train", "lr_warmup_samples", 1000, "=1000, which are 1,000 sequences"),
        ("train", "rampup_batch_size", [1, 2], r"=\[1, 2\]: give \[start, increment, samples\]"),
        ("train", "rampup_batch_size", [1, 0, 9], r"=\[1, 0, 9\]: .*each 1 or more"),
        ("train", "rampup_batch_size", [1, 1, 9], "from 1 to train.global_batch_size=1 in whole"),
        ("checkpoint", "keep_latest", 0, "checkpoint.keep_latest=0"),
        ("checkpoint", "save_interval", -1, "checkpoint.save_interval=-1: must be 0 or more"),
        ("data", "mode", "pact", "data.mode='pact': must be one of 'packed', 'padded'"),
        ("log", "profile_steps", [3, 2], r"log.profile_steps=\[3, 2\]"),
        ("log", "profile_steps", [3], r"log.profile_steps=\[3\]"),
        ("data", "train_weights", [1.0], r"1 value\(s\) for the 0 set\(s\)"),
    ],
)
def test_values_out_of_range_are_named(section, name, value, expected):
    settings = Settings()
    setattr(getattr(settings, section), name, value)
    with pytest.raises(ValueError, match=expected):
        check_values(settings)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"lr_warmup_steps": 2, "lr_warmup_samples": 4}, "=2 and train.lr_warmup_samples=4 say"),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_steps": 9, "lr_warmup_steps": 2},
            "train.lr_wsd_decay_steps=9 and train.lr_warmup_steps=2 are together more than .*=10$",
        ),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_samples": 40},
            "=40 and train.lr_warmup_fraction=0.1 are together .*=10, which are 40 sequences",
        ),
        ({"rampup_batch_size": [1, 2, 9]}, "from 1 to train.global_batch_size=4 in whole increm"),
    ],
)
def test_schedules_that_do_not_fit_are_named(train, expected):
    settings = Settings(train=TrainSettings(steps=10, global_batch_size=4, **train))
    with pytest.raises(ValueError, match=expected):
        check_values(settings)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("one", "data.valid='one': must be a list of prefixes, or a mapping of names"),
        ([1], "must be a list of prefixes"),
        ({"a b": "one"}, r"\(letters, digits, _ . -\) to prefixes"),
        ({"a": {"b": "one"}}, "must be a list of prefixes"),
        ({"a": ["one", 2]}, "must be a list of prefixes"),
        ([], None),
        (None, None),
        ({"a": "one", "b-2": ["two", "three"]}, None),
    ],
)
def test_held_out_sets_are_a_list_or_have_names(value, expected):
    settings = Settings()
    settings.data.valid = value
    if expected is None:
        return check_values(settings)
    with pytest.raises(ValueError, match=expected):
        check_values(settings)


@pytest.mark.parametrize(
    ("split", "expected"),
    [("969, 30, 1", None), ("9,1", None), (".5,.5,0", None), ("100", "two or three numbers"),
     ("0,1", "the first not 0"), ("1,2,3,4", "two or th"), ("a,b", "'969, 30, 1'")],
)  # fmt: skip
def test_a_split_is_megatrons(split, expected):
    settings = Settings()
    settings.data.split = split
    if expected is None:
        check_values(settings)
        settings.data.valid = ["held-out"]
        expected = "data.valid=.'held-out'.: both hold data out"
    with pytest.raises(ValueError, match=expected):
        check_values(settings)


def test_held_out_sets_of_either_form_replace_the_other_and_join_their_own(tmp_path):
    named = write(tmp_path, "named.yaml", "data: {valid: {a: one, b: [two, 'three']}}")
    listed = write(tmp_path, "listed.yaml", "extends: named.yaml\ndata: {valid: [four]}")
    again = write(tmp_path, "again.yaml", "extends: listed.yaml\ndata: {valid: {c: five}}")

    def sets(path: Path, *overrides: str) -> dict[str, list[str]]:
        settings = load_settings(path, overrides)
        kept = write(tmp_path, "kept/config.yaml", settings.to_yaml())
        assert load_settings(kept).data.valid == settings.data.valid
        return held_out_sets(settings.data)

    assert sets(named) == {"a": ["one"], "b": ["two", "three"]}
    assert sets(named, "data.valid.c=four") == {**sets(named), "c": ["four"]}
    assert sets(named, "data.valid=[four]") == sets(listed) == {"": ["four"]}
    assert sets(again) == {"c": ["five"]}
    assert sets(again, "data.valid=${data.train}", "data.train=[six]") == {"": ["six"]}
    assert sets(again, "data.valid=[]") == {}


def test_weights_leave_something_to_read():
    settings = Settings()
    settings.data.train = ["a", "b"]
    for weights in ([1.0, -1.0], [0.0, 0.0]):
        settings.data.train_weights = weights
        with pytest.raises(ValueError, match="each must be 0 or more, and one of them greater"):
            check_values(settings)
    settings.data.train_weights = [1.0, 0.0]
    check_values(settings)


@pytest.mark.parametrize(
    ("world_size", "layout", "train", "expected"),
    [
        (3, {"tensor_model_parallel_size": 2}, {}, "does not divide the number of processes, 3"),
        (4, {"expert_model_parallel_size": 3}, {}, r"expert_model_parallel_size \(3\)"),
        (
            4,
            {"tensor_model_parallel_size": 2, "sequence_parallel": False},
            {},
            "parallel.sequence_parallel=false",
        ),
        (1, {"overlap_param_gather": True}, {}, "use_distributed_optimizer=true"),
        (2, {}, {"global_batch_size": 6, "micro_batch_size": 2}, "global_batch_size=6"),
        (
            2,
            {},
            {"global_batch_size": 8, "rampup_batch_size": [3, 5, 10]},
            r"rampup_batch_size=\[3, 5, 10\]: start .* data-parallel size \(2\), here of 2",
        ),
        (
            2,
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            {"global_batch_size": 8, "rampup_batch_size": [3, 5, 10]},
            r"x pipeline_model_parallel_size \(2\), here of 2",
        ),
        (1, {"virtual_pipeline_model_parallel_size": 2}, {}, "pipeline_model_parallel_size > 1"),
        (1, {"tensor_model_parallel_size": 0}, {}, "tensor_model_parallel_size=0: must be gr"),
        (8, {"expert_model_parallel_size": 8}, {}, r"num_moe_experts=63.*legal sizes are 1, 3, 7,"),
        (
            2,
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            {"global_batch_size": 3},
            r"number of micro-batches \(3\)",
        ),
    ],
)
def test_layouts_that_cannot_be_are_named(world_size, layout, train, expected):
    settings = Settings(model={"num_moe_experts": 63})
    for section, values in ((settings.parallel, layout), (settings.train, train)):
        for name, value in values.items():
            setattr(section, name, value)
    with pytest.raises(ValueError, match=expected):
        check_layout(settings, world_size)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": {"micro_batch_size": 2}}, "train.micro_batch_size=2"),
        ({"parallel": {"context_parallel_size": 2}}, "to a multiple of 4"),
        ({"data": {"pad_seq_to_mult": 3}}, "data.pad_seq_to_mult=3 does not divide"),
        ({"model": {"mtp_num_layers": 1}}, "model.mtp_num_layers=1: multi-token prediction"),
        ({"parallel": {"context_parallel_size": 2}, "data": {"pad_seq_to_mult": 4}}, None),
        ({"data": {"mode": "padded"}, "train": {"micro_batch_size": 1}}, None),
    ],
)
def test_what_document_masks_cannot_be_combined_with_is_named(changes, expected):
    settings = Settings(model={"num_moe_experts": 8, "seq_length": 64})
    settings.data.mode, settings.train.global_batch_size = "packed_documents", 4
    settings.model |= changes.get("model", {})
    for section, values in changes.items():
        for name, value in values.items() if section != "model" else ():
            setattr(getattr(settings, section), name, value)
    if expected is None:
        return check_layout(settings, world_size=2)
    with pytest.raises(ValueError, match=expected):
        check_layout(settings, world_size=2)


def test_an_average_wants_whole_weights():
    settings = Settings()
    settings.parallel.use_distributed_optimizer = settings.parallel.overlap_param_gather = True
    settings.train.ema_decay = 0.9
    with pytest.raises(ValueError, match=r"train.ema_decay=0.9 with parallel.overlap_param_gather"):
        check_layout(settings, world_size=2)


def test_micro_batches_of_a_replica():
    settings = Settings()
    settings.parallel.tensor_model_parallel_size = 2
    settings.train.global_batch_size, settings.train.micro_batch_size = 24, 3
    check_layout(settings, world_size=8)
    assert (
        num_microbatches(settings.parallel, settings.train, world_size=8) == 2
    )  # 4 replicas x 3 sequences x 2


@pytest.mark.parametrize(
    ("former", "value", "present"),
    [
        ("train.stop_step", 7, "train.exit_step"),
        ("train.nonfinite", "skip", "train.on_nonfinite"),
        ("checkpoint.keep", 5, "checkpoint.keep_latest"),
        ("checkpoint.accept_changes", ["model.x"], "checkpoint.allow_config_changes"),
    ],
)
def test_former_names_are_read_and_present_ones_written(tmp_path, former, value, present):
    section, name = former.split(".")
    file = write(tmp_path, "old.yaml", f"{section}: {{{name}: {value}}}")
    empty = write(tmp_path, "empty.yaml", "{}")
    new, text = present.split(".")[1], str(value).replace("'", "")
    for settings in (load_settings(file), load_settings(empty, [f"{former}={text}"])):
        assert getattr(getattr(settings, section), new) == value
        assert f"  {new}:" in settings.to_yaml() and f"  {name}:" not in settings.to_yaml()
    both = write(tmp_path, "both.yaml", f"{section}: {{{name}: {value}, {new}: {value}}}")
    assert f"{former} is the former name of {present}" in refused(both)
    assert "give one of them" in refused(empty, f"{former}={text}", f"{present}={text}")
    extending = write(tmp_path, "new.yaml", f"extends: old.yaml\n{section}: {{{new}: null}}")
    if value == 7:
        assert load_settings(extending).train.exit_step is None


def test_the_former_name_of_a_mode_is_read(tmp_path):
    path = write(tmp_path, "old.yaml", "data: {mode: examples}")
    assert load_settings(path).data.mode == "padded"
    assert load_settings(path, ["data.mode=packed"]).data.mode == "packed"
    assert load_settings(path, ["data.mode=examples"]) == load_settings(path)
