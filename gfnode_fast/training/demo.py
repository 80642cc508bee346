"""The demo: two minutes of training on the shipped aspirin run, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gfnode_fast.training.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from gfnode_fast.training.evaluation import evaluate
from gfnode_fast.training.figure import save_figure
from gfnode_fast.training.loop import Callback, TrainResult, train
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
    """A small model and a fixed number of steps, about two minutes on two CPU cores.

    Small batches, because the published algorithm's cost grows with the cube of the batch when
    times are irregular; many windows, each seen rarely, because 2 modes of aspirin are learned
    from variety and not from repetition.
    """
    return TrainConfig(
        data=DataConfig(
            trajectory="sample:aspirin", train_size=4000, val_size=200, test_size=500, seed=0
        ),
        model=ModelConfig(n_layers=2, hidden_nf=32, num_modes=2),
        optim=OptimConfig(lr=1e-3, batch_size=10, epochs=3, lr_step_epochs=1, validate_every=1),
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
    training = train(config, progress=progress)
    report_path, figure_path = training.output / "report.json", training.output / "report.png"
    if training.status == "interrupted":
        return DemoResult(training, None, report_path, figure_path)
    report = evaluate(training.output, device=config.device)
    report.save(report_path)
    save_figure(report, figure_path)
    return DemoResult(training, report, report_path, figure_path)
