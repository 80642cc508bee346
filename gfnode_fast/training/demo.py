"""The demo: two minutes of training on the shipped aspirin run, and what came of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gfnode_fast.training.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from gfnode_fast.training.evaluation import evaluate
from gfnode_fast.training.events import Callback, TrainResult
from gfnode_fast.training.figure import save_figure
from gfnode_fast.training.loop import train
from gfnode_fast.training.report import Report

# The error must end at least this fraction below that of "nothing moves".
REQUIRED_IMPROVEMENT = 0.10


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Attributes:
        training: how the training ended.
        report: of the held-out test block; ``None`` if the training was interrupted.
        report_path, figure_path: where the report is, as JSON and PNG.
    """

    training: TrainResult
    report: Report | None
    report_path: Path
    figure_path: Path

    @property
    def passed(self) -> bool:
        """Whether the error is far enough below that of "nothing moves"."""
        return self.report is not None and self.report.improvement >= REQUIRED_IMPROVEMENT


def demo_config(output: str) -> TrainConfig:
    """A small model and a fixed number of steps, at most two minutes on two CPU cores.

    Many windows, each seen twice: windows of one block overlap, so that more passes learn that
    block by heart and the error on the next block grows again. The best validation is kept.
    """
    return TrainConfig(
        data=DataConfig(
            trajectory="sample:aspirin", train_size=8000, val_size=200, test_size=500, seed=0
        ),
        model=ModelConfig(n_layers=2, hidden_nf=32, num_modes=2),
        optim=OptimConfig(lr=2e-3, batch_size=16, epochs=2, lr_step_epochs=1, validate_every=1),
        output=output,
        device="cpu",
        checkpoint_every=1,
    )


def run_demo(output: str | Path, *, progress: Callback | None = None) -> DemoResult:
    """Train, evaluate on held-out time blocks, and write ``report.json`` and ``report.png``.

    Raises:
        ConfigError: ``output`` holds a run already.
    """
    config = demo_config(str(output))
    with _one_thread():
        training = train(config, progress=progress)
        report_path, figure_path = training.output / "report.json", training.output / "report.png"
        if training.status == "interrupted":
            return DemoResult(training, None, report_path, figure_path)
        report = evaluate(training.output, device=config.device)
    report.save(report_path)
    save_figure(report, figure_path)
    return DemoResult(training, report, report_path, figure_path)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """So small a model is slower on several threads, and its rounding depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
