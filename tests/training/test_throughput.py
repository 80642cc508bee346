"""What `gfnode-fast bench` times and recommends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gfnode_fast.cli import console
from gfnode_fast.solvers import compiled
from gfnode_fast.training import Throughput, best_settings, measure_throughput, throughput
from small_run import mixed_config, mixed_files, small_config


def test_each_setting_is_tried_on_top_of_the_fastest(
    trajectory_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With times that are made up: threads, backend, exact and recompute, the last one slower."""

    def timed(self: Any, config: Any, row: Throughput) -> Throughput:
        seconds = 1.0
        seconds *= 0.5 if row.threads == 2 else 1.0
        seconds *= 2.0 if config.model.backend == "torch" else 1.0
        seconds *= 0.5 if config.model.solver_mode == "exact" else 1.0
        seconds *= 3.0 if config.model.recompute else 1.0
        return replace(row, step_seconds=seconds, samples_per_second=row.batch_size / seconds)

    monkeypatch.setattr(throughput._Search, "_timed", timed)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    rows = measure_throughput(small_config(trajectory_file, Path("unused")), [60, 2, 60])
    assert [(row.setting, row.threads) for row in rows if row.batch_size == 2] == [
        ("published model", 4),
        ("as configured", 1),
        ("as configured", 2),
        ("as configured", 4),
        ("model.backend=torch", 2),
        ("model.solver_mode=exact", 2),
        ("model.solver_mode=exact model.recompute=true", 2),
    ]
    best = best_settings(rows)
    assert list(best) == [60, 2]
    console.say_best_settings(list(best.values()))
    assert capsys.readouterr().out.splitlines() == [
        f"batches of {size}: OMP_NUM_THREADS=2 gfnode-fast train --optim.batch_size {size} "
        "--model.solver_mode exact"
        for size in (60, 2)
    ] + ["most samples a second: batches of 60, 240.0"]


def test_compiled_solves_say_when_they_pay_back(
    trajectory_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(compiled, "_GRAPHS", {})
    config = small_config(trajectory_file, Path("unused"), model={"mode_interaction": "attention"})
    rows = measure_throughput(config, [60], seconds=1e-3, compiled=True)
    assert [row.setting for row in rows if row.break_even] == ["model.backend=compiled"]
    console.say_throughput(next(row for row in rows if row.break_even))
    assert " s, " in capsys.readouterr().out.partition("compiling took ")[2]


def test_several_molecules(tmp_path: Path) -> None:
    config = mixed_config(mixed_files(tmp_path), Path("unused"))
    best = best_settings(measure_throughput(config, [5], seconds=1e-3))
    assert best[5].samples_per_second > 0


@pytest.mark.gpu
def test_capture_is_tried_on_a_gpu(trajectory_file: Path) -> None:
    config = small_config(
        trajectory_file, Path("unused"), device="cuda", model={"backend": "triton"}
    )
    rows = measure_throughput(config, [4], seconds=1e-3)
    captured = [row for row in rows if "capture=true" in row.setting]
    assert len(captured) >= 1
    assert captured[0].problem is None or "host" in captured[0].problem
