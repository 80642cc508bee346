"""Training, evaluation and prediction: ``train``, ``evaluate``, ``predict``."""

from gfnode_fast.training.agreement import Agreement, check_checkpoint
from gfnode_fast.training.checkpoint import CheckpointError
from gfnode_fast.training.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    config_from_dict,
    config_to_dict,
)
from gfnode_fast.training.demo import DemoResult, run_demo
from gfnode_fast.training.evaluation import evaluate
from gfnode_fast.training.events import NonFiniteLossError, TrainEvent, TrainResult
from gfnode_fast.training.extxyz import write_extxyz
from gfnode_fast.training.figure import save_figure
from gfnode_fast.training.loop import train
from gfnode_fast.training.metrics import read_metrics
from gfnode_fast.training.prediction import (
    TrajectoryPrediction,
    predict,
    predict_from_trajectory,
)
from gfnode_fast.training.problem import GraphMismatchError
from gfnode_fast.training.ranks import PeerLostError
from gfnode_fast.training.report import Distribution, Report, read_report
from gfnode_fast.training.sweep import ModeResult, save_sweep_figure, sweep_modes
from gfnode_fast.training.throughput import Throughput, best_settings, measure_throughput
from gfnode_fast.training.trained import TrainedModel, choose_model, load_model, load_models

__all__ = [
    "Agreement",
    "CheckpointError",
    "ConfigError",
    "DataConfig",
    "DemoResult",
    "Distribution",
    "GraphMismatchError",
    "ModeResult",
    "ModelConfig",
    "NonFiniteLossError",
    "OptimConfig",
    "PeerLostError",
    "Report",
    "Throughput",
    "TrainConfig",
    "TrainEvent",
    "TrainResult",
    "TrainedModel",
    "TrajectoryPrediction",
    "best_settings",
    "check_checkpoint",
    "choose_model",
    "config_from_dict",
    "config_to_dict",
    "evaluate",
    "load_model",
    "load_models",
    "measure_throughput",
    "predict",
    "predict_from_trajectory",
    "read_metrics",
    "read_report",
    "run_demo",
    "save_figure",
    "save_sweep_figure",
    "sweep_modes",
    "train",
    "write_extxyz",
]
