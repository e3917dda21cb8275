"""Memory, host_syncs, exposed communication and the table of targets."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
import torch.distributed as dist

from benchmarks import communication, report
from benchmarks.agreement import check_agreement
from benchmarks.host_syncs import count_host_syncs
from benchmarks.memory import footprint, storage_bytes
from benchmarks.timing import Spread
from megatron_coe.utils.environment import versions

CPU = torch.device("cpu")
MIB = 2**20


def test_memory_is_what_is_held_and_the_highest_point_above_it():
    held = torch.zeros(MIB // 4)

    def run(lap):
        first = torch.zeros(2 * MIB // 4)
        second = torch.zeros(4 * MIB // 4)
        del second
        lap("one")
        third = torch.zeros(1 * MIB // 4)
        del first, third
        lap("two")

    found = footprint([held, held.view(2, -1)], run, CPU)
    assert found.held == MIB
    assert found.passing["one"] == pytest.approx(6 * MIB, rel=0.01)
    assert found.passing["two"] == pytest.approx(3 * MIB, rel=0.01)
    assert found.peak == found.held + found.passing["one"]


def test_a_storage_counts_once_and_whole():
    whole = torch.zeros(100, dtype=torch.float64)
    assert storage_bytes([whole[:10], whole[50:], torch.zeros(0)]) == 800


def test_synchronizations_are_counted_where_they_happen():
    x = torch.tensor([1.0, 0.0, 2.0], requires_grad=True)

    def work():
        (x.sum() * 2).backward()  # none
        x.detach().sum().item()
        x.detach().tolist()
        x.detach()[x.detach() > 0]
        torch.nonzero(x.detach())

    counts = count_host_syncs(work, CPU)
    assert counts.total() == 4
    assert all(place.startswith("benchmarks/test_measures.py:") for place in counts)
    assert len(counts) == 4


def test_union_and_exposed_length():
    assert communication.union([(3, 5), (0, 1), (4, 6), (1, 2)]) == [(0, 2), (3, 6)]
    assert communication.exposed([(0, 4), (2, 6)], [(1, 3), (5, 9)]) == 1 + 2
    assert communication.exposed([], [(0, 1)]) == 0


def test_waiting_in_collectives_is_exposed():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        spent = []

        def work():
            time.sleep(0.1)
            tensor = torch.ones(1000)
            began = time.perf_counter()
            for _ in range(300):
                dist.all_reduce(tensor)
            spent.append(time.perf_counter() - began)

        began = time.perf_counter()
        share = communication.exposed_share(work, CPU)
        exposed = share * (time.perf_counter() - began)
        assert 0.2 * spent[0] < exposed < spent[0]  # the rest is Python, slow while it is watched
        assert communication.exposed_share(lambda: time.sleep(0.05), CPU) == 0
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("factor", "fails"), [(1 + 1e-5, False), (1.01, True), (torch.nan, True)])
def test_agreement(factor, fails):
    ours = {"y": torch.randn(50), "only here": torch.ones(1)}
    theirs = {"y": ours["y"] * factor}
    if fails:
        with pytest.raises(ValueError, match="y differs by"):
            check_agreement(("a", "b"), ours, theirs, torch.float32)
    else:
        assert set(check_agreement(("a", "b"), ours, theirs, torch.float32)) == {"y"}


def test_variants_in_bf16_may_differ_by_whole_tokens_also_in_gradients_kept_in_fp32():
    ours, theirs = {"y": torch.ones(100)}, {"y": torch.ones(100)}
    theirs["y"][:2] = 2  # ||a - b|| / ||b|| = 0.14
    check_agreement(("a", "b"), ours, theirs, torch.bfloat16)
    with pytest.raises(ValueError, match="y differs by"):
        check_agreement(("a", "b"), ours, theirs, torch.float32)


def test_nothing_in_common_is_no_agreement():
    with pytest.raises(ValueError, match="no value in common"):
        check_agreement(("a", "b"), {"x": torch.ones(1)}, {"y": torch.ones(1)}, torch.float32)


def test_targets_name_every_ratio_and_judge_it():
    figures = {"step": Spread.of([1.08]), "layer": Spread.of([1.6]), "experts": Spread.of([0.5])}
    lines = report.target_table(figures, on_gpu=False).splitlines()
    assert len(lines) == 2 + len(report.TARGETS)
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines[2:]}
    assert cells["step time CoE-2(4/64) / MoE(8/64)"][4] == "must"
    layer = next(row for name, row in cells.items() if name.startswith("CoE layer"))
    assert layer[4] == "stretch"
    experts = next(row for name, row in cells.items() if name.startswith("routed experts"))
    assert experts[4] == "missed"
    unmeasured = next(row for name, row in cells.items() if name.startswith("seconds for 1,000"))
    assert unmeasured[3] == "not measured (needs a GPU)"
    on_gpu = report.target_table(figures, on_gpu=True)
    assert "needs a GPU" not in on_gpu


def test_a_report_has_commit_versions_and_every_sample(tmp_path):
    outcome = report.Outcome("step", "A step", ["a"], [["1"]], {"step": Spread.of([1.0, 2.0])})
    outcome.samples = {"variant": {"total": [1.0, 2.0]}}
    heading = {"machine": report.machine(CPU), "versions": versions()}
    report.write_json(tmp_path / "deep" / "out.json", heading, [outcome])
    document = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert document["outcomes"][0]["samples"] == {"variant": {"total": [1.0, 2.0]}}
    assert document["outcomes"][0]["figures"]["step"]["median"] == 1.5
    assert document["versions"]["torch"] == torch.__version__
    assert document["machine"]["cores"] == os.cpu_count()
    assert outcome.markdown() == "**A step**\n\n| a |\n| --- |\n| 1 |"
