"""What each subcommand does. Each returns an exit code; the signatures are the options."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

from gfnode_fast.cli import console
from gfnode_fast.cli.console import FAILED, INTERRUPTED, OK
from gfnode_fast.info import info as describe_installation
from gfnode_fast.training import (
    ConfigError,
    ModeResult,
    Throughput,
    TrainConfig,
    best_settings,
    check_checkpoint,
    choose_model,
    evaluate,
    load_models,
    measure_throughput,
    predict_from_trajectory,
    run_demo,
    save_figure,
    save_sweep_figure,
    sweep_modes,
    train,
    write_extxyz,
)
from gfnode_fast.training.config import DataConfig
from gfnode_fast.training.demo import REQUIRED_IMPROVEMENT
from gfnode_fast.training.problem import load_problem
from gfnode_fast.training.ranks import is_first_process
from gfnode_fast.training.report import Report
from gfnode_fast.training.trained import model_for_trajectory


def demo_command(output: str = "runs/demo") -> int:
    """Train a small model on the shipped aspirin trajectory for at most about two minutes.

    Args:
        output: directory of the run; a number is added if it exists.
    """
    directory = _new_directory(Path(output))
    console.say("GF-NODE on aspirin's heavy atoms (GFN2-xTB, 500 K), two minutes at most")
    with console.training_progress() as progress:
        result = run_demo(directory, progress=progress)
    console.say_training(result.training)
    if result.report is None:
        return INTERRUPTED
    console.say_report(result.report)
    console.say(f"report: {result.figure_path} and {result.report_path}")
    console.say(f"more:   gfnode-fast predict {directory} --output predicted.extxyz")
    improvement = result.report.improvement
    verdict = f"{improvement:.1%} below 'nothing moves' on a held-out block of time"
    if not result.passed:
        console.complain(f"demo: failed: {verdict}, needed {REQUIRED_IMPROVEMENT:.0%}")
        return FAILED
    console.say(f"passed: {verdict}")
    return OK


def train_command(config: TrainConfig, resume: bool) -> int:
    """Train a model."""
    if is_first_process():
        with console.training_progress() as progress:
            result = train(config, resume=resume, progress=progress)
        console.say_training(result)
    else:
        result = train(config, resume=resume)
    return INTERRUPTED if result.status == "interrupted" else OK


def sweep_modes_command(config: TrainConfig, modes: str) -> int:
    """Train with several numbers of modes; print and draw error and time against M.

    Args:
        config: of the runs.
        modes: numbers of modes, as 1,2,3,5.
    """
    wanted = _integers("sweep-modes", "modes", modes) or []
    rows: list[tuple[str, ...]] = []

    def found(result: ModeResult) -> None:
        after = "none left" if result.gap is None else f"{result.gap:.3g}"
        gap = "cuts an eigenspace" if result.cuts else after
        milliseconds = f"{1e3 * result.step_seconds:.1f}"
        errors = (f"{result.mse:.4f}", f"{result.mse_last:.4f}")
        rows.append((str(result.num_modes), gap, *errors, milliseconds))

    with console.training_progress() as progress:
        results = sweep_modes(config, wanted, progress=progress, found=found)
    console.say_table(("M", "gap after", "MSE, Å²", "at last time", "ms a step"), rows)
    if results:
        console.say(f"nothing moves: {results[0].nothing_moves:.4f} Å²")
        picture = Path(config.output) / "sweep.png"
        save_sweep_figure(results, picture)
        console.say(f"picture: {picture}")
    return OK if len(results) == len(wanted) else INTERRUPTED


def bench_command(
    config: TrainConfig, batch_sizes: str, seconds: float, compiled: bool = False
) -> int:
    """Time training steps on this machine; say which settings to use here.

    Args:
        config: of a run; nothing is written.
        batch_sizes: as 10,50,200.
        seconds: spent on each setting.
        compiled: also time model.backend=compiled, which takes minutes to compile.
    """
    wanted = _integers("bench", "batch_sizes", batch_sizes) or []

    def found(row: Throughput) -> None:
        console.say_throughput(row)

    rows = measure_throughput(config, wanted, seconds=seconds, compiled=compiled, found=found)
    best = best_settings(rows)
    console.say_best_settings(list(best.values()))
    if not compiled and config.model.backend != "compiled":
        console.say("not timed: model.backend=compiled, minutes to compile; add --compiled true")
    return OK if len(best) == len(set(wanted)) else FAILED


def evaluate_command(
    run: str,
    molecule: str | None = None,
    trajectory: str | None = None,
    dt_fs: float | None = None,
    split: Literal["train", "val", "test"] = "test",
    batch_size: int | None = None,
    device: str = "auto",
    output: str | None = None,
    json: bool = False,
) -> int:
    """Evaluate a trained model beside simple baselines; write report.json and report.png.

    Of one of several molecules they are report-NAME.json and report-NAME.png.

    Args:
        run: directory of a run (its best checkpoint, else its last), or best.json or last.json.
        molecule: name, or number from 0, of one of several; default: that of the trajectory, or
            all of them.
        trajectory: another trajectory of the same molecule.
        dt_fs: time between its frames, fs, where the file does not say.
        split: the windows to evaluate on.
        batch_size: windows at once; default as in training.
        device: auto, cpu, cuda or cuda:N.
        output: directory for the report; default: the run's.
    """
    shown = contextlib.nullcontext() if json else console.step_progress("window")
    with shown as show:
        report = evaluate(
            run,
            molecule=molecule,
            trajectory=trajectory,
            dt_fs=dt_fs,
            split=split,
            batch_size=batch_size,
            device=device,
            progress=None if show is None else lambda done, total: show(done, total, ""),
        )
    directory = Path(output) if output is not None else Path(report.checkpoint).parent
    directory.mkdir(parents=True, exist_ok=True)
    figure, data = (directory / f"{_stem(report)}.{kind}" for kind in ("png", "json"))
    for own in (report, *report.molecules.values()):
        own.save(directory / f"{_stem(own)}.json")
        save_figure(own, directory / f"{_stem(own)}.png")
    if json:
        console.say_json(report.to_dict())
        return OK
    console.say_report(report)
    console.say(f"report: {figure} and {data}")
    return OK


def _stem(report: Report) -> str:
    """Of its files, so that one molecule's do not overwrite another's, nor those of all."""
    return "report" if report.molecule is None else f"report-{report.molecule}"


def predict_command(
    run: str,
    molecule: str | None = None,
    trajectory: str | None = None,
    dt_fs: float | None = None,
    start: str | None = None,
    times: str | None = None,
    output: str = "predicted.extxyz",
    device: str = "auto",
) -> int:
    """Predict from frames of a trajectory; write extended XYZ, and the true frames beside it.

    Args:
        run: directory of a run (its best checkpoint, else its last), or best.json or last.json.
        molecule: name, or number from 0, of one of several; default: that of the trajectory.
        trajectory: where the start frames are; default: what the model was trained on.
        dt_fs: time between its frames, fs, where the file does not say.
        start: frame numbers to start from, as 10,390; default: the first test window's.
        times: frames after the start, as 100,200,400; default: as many as the model has, evenly
            spread.
        output: the file; the true frames go to NAME_true.extxyz where the trajectory has them.
        device: auto, cpu, cuda or cuda:N.
    """
    path = Path(output)
    if path.suffix not in (".extxyz", ".xyz"):
        raise ConfigError(
            f"predict: `output` must end in .extxyz or .xyz, got {output!r}; rename it"
        )
    if not path.parent.is_dir():
        raise ConfigError(
            f"predict: `output` must be in a directory that exists, got {output!r}; make it first"
        )
    if trajectory is None and dt_fs is not None:
        raise ConfigError(
            f"predict: `dt_fs` must be left out without `trajectory`, got {dt_fs}; "
            "the training's trajectory has its own"
        )
    starts, ahead = _integers("predict", "start", start), _integers("predict", "times", times)
    models = load_models(run, device=device)
    if trajectory is not None:
        trained, frames = model_for_trajectory(models, trajectory, dt_fs=dt_fs, molecule=molecule)
        data = trained.config.data
        first = frames.starts()[:1]
    else:
        trained = choose_model(models, molecule)
        data = trained.config.data
        problem = load_problem(data, stored_graph=trained.graph)
        frames = problem.trajectory
        first = problem.windows["test"].start[:1].numpy()
    if starts is None:
        starts = frames.frames[first].tolist()
    if ahead is None:
        count = data.num_timesteps
        ahead = [k * data.delta_frame // count for k in range(1, count + 1)]
    found = predict_from_trajectory(trained, frames, starts, ahead)
    infos = [
        {"start_frame": begin, "frame": begin + time, "time_fs": time * frames.dt_fs}
        for begin in found.starts.tolist()
        for time in found.times.tolist()
    ]
    flat = found.positions.reshape(-1, *found.positions.shape[2:])
    write_extxyz(path, flat, frames.numbers, infos=infos)
    console.say(f"predicted: {path}, {len(flat)} frames")
    known = found.known.reshape(-1)
    if known.any():
        beside = path.with_name(f"{path.stem}_true{path.suffix}")
        true = found.true.reshape(flat.shape)[known]
        kept = [info for info, some in zip(infos, known, strict=True) if some]
        write_extxyz(beside, true, frames.numbers, infos=kept)
        console.say(f"true:      {beside}, {len(true)} of them")
        error = float(((flat[known] - true) ** 2).mean())
        console.say(f"mean squared error per coordinate over those: {error:.4f} Å²")
    return OK


def info_command(json: bool = False) -> int:
    """Print versions, devices and backends, and why something is not available.

    Args:
    """
    values = describe_installation()
    if json:
        console.say_json(values)
    else:
        console.say_nested(values)
    return OK


def check_command(
    checkpoint: str,
    trajectory: str = "sample:aspirin",
    dt_fs: float | None = None,
    heavy_only: bool = True,
    delta_frame: int = 3000,
    num_timesteps: int = 8,
    time_mode: Literal["none", "concat", "mlp", "posenc", "rope"] | None = None,
    solver: str = "dopri5",
    rtol: float = 1e-3,
    atol: float = 1e-4,
    norm: bool = False,
    propagate_x: bool = True,
    propagate_h: bool = True,
    no_fourier: bool = False,
    no_ode: bool = False,
    backend: str = "auto",
    batch_size: int = 10,
    device: str = "auto",
    json: bool = False,
) -> int:
    """Run the reference and the fast model with somebody's weights; print errors and speed.

    Args:
        checkpoint: a state_dict (torch.save or safetensors) or a run of this package; weights only.
        trajectory: a file or sample:aspirin or sample:ethanol.
        dt_fs: time between its frames, fs, where the file does not say.
        heavy_only: drop hydrogens.
        delta_frame: of the training.
        num_timesteps: of the training.
        time_mode: of the training; needed where the weights leave it open.
        solver: of the training.
        rtol: of the training.
        atol: of the training.
        norm: of the training.
        propagate_x: of the training.
        propagate_h: of the training.
        no_fourier: of the training.
        no_ode: of the training.
        backend: of the fast model.
        batch_size: windows in a pass.
        device: auto, cpu, cuda or cuda:N.
    """
    data = DataConfig(
        trajectory=trajectory,
        dt_fs=dt_fs,
        heavy_only=heavy_only,
        delta_frame=delta_frame,
        num_timesteps=num_timesteps,
    )
    agreement = check_checkpoint(
        checkpoint,
        data=data,
        time_mode=time_mode,
        solver=solver,
        rtol=rtol,
        atol=atol,
        norm=norm,
        propagate_x=propagate_x,
        propagate_h=propagate_h,
        no_fourier=no_fourier,
        no_ode=no_ode,
        backend=backend,
        batch_size=batch_size,
        device=device,
    )
    if json:
        console.say_json(agreement.to_dict())
    else:
        console.say_agreement(agreement)
    return OK if agreement.passed else FAILED


def _integers(op: str, name: str, text: str | None) -> list[int] | None:
    """``10,20`` (or ``[10, 20]``) as a list."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.strip("[] ").split(",")]
    except ValueError as error:
        raise ConfigError(
            f"{op}: `{name}` must be whole numbers as in 100,200, got {text!r}; correct it"
        ) from error


def _new_directory(wanted: Path) -> Path:
    """``wanted``, or ``wanted-2``, ``wanted-3`` … if it exists."""
    directory, number = wanted, 1
    while directory.exists():
        number += 1
        directory = wanted.with_name(f"{wanted.name}-{number}")
    return directory
