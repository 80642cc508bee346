"""Everything that the command line prints."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gfnode_fast.training import Agreement, Report, Throughput, TrainEvent, TrainResult
from gfnode_fast.training.metrics import OF_MOLECULE
from gfnode_fast.training.report import MODEL, NOTHING_MOVES, PREDICTORS

OK, FAILED, INTERRUPTED = 0, 1, 130  # exit codes

# Seconds between two lines of progress where there is no terminal to redraw.
_LINE_EVERY = 10.0


def say(text: str = "") -> None:
    """Print a line of output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def complain(text: str) -> None:
    """Print a line to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def say_json(values: object) -> None:
    """Print plain values as JSON."""
    say(json.dumps(values, indent=1, ensure_ascii=False))


def say_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the first column left and the others right aligned."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        say("  " + "   ".join((first, *others)).rstrip())


def say_throughput(row: Throughput) -> None:
    """One line of `gfnode-fast bench`."""
    head = f"B = {row.batch_size:<6} {row.threads} thread{'s' if row.threads > 1 else ' '}"
    if row.step_seconds is None:
        say(f"{head}   {row.setting}: {row.problem}")
        return
    text = f"{1e3 * row.step_seconds:9.2f} ms a step   {row.samples_per_second:9.1f} samples/s"
    if row.peak_bytes is not None:
        text += f"   {row.peak_bytes / 2**20:8.1f} MB"
    text += f"   {row.setting}"
    if row.break_even is not None:
        steps = row.break_even.steps
        after = "does not pay back" if steps is None else f"pays back after {steps} steps"
        text += f": compiling took {row.break_even.compile_seconds:.0f} s, {after}"
    say(head + text)


def say_best_settings(best: Sequence[Throughput]) -> None:
    """What `gfnode-fast bench` recommends: the fastest setting of each batch size."""
    for row in best:
        say(
            f"batches of {row.batch_size}: OMP_NUM_THREADS={row.threads} gfnode-fast train "
            f"{row.command_line()}"
        )
    rates = {row.batch_size: row.samples_per_second or 0.0 for row in best}
    if len(rates) > 1:
        size = max(rates, key=rates.__getitem__)
        say(f"most samples a second: batches of {size}, {rates[size]:.1f}")


@contextlib.contextmanager
def step_progress(unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """A function of (done, total, note): a bar on a terminal, a line now and then elsewhere."""
    if sys.stderr.isatty():
        with _bar(unit) as show:
            yield show
        return
    spoken, last = -_LINE_EVERY, ""

    def line(done: int, total: int, note: str) -> None:
        nonlocal spoken, last
        now = time.monotonic()
        text = f"{unit} {done}/{total}" + (f"  {note}" if note else "")
        if text != last and (now - spoken >= _LINE_EVERY or done == total):
            spoken, last = now, text
            say(text)

    yield line


@contextlib.contextmanager
def _bar(unit: str) -> Iterator[Callable[[int, int, str], None]]:
    from tqdm import tqdm

    with tqdm(unit=f" {unit}s", dynamic_ncols=True) as bar:

        def show(done: int, total: int, note: str) -> None:
            bar.total = total
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

        yield show


@contextlib.contextmanager
def training_progress() -> Iterator[Callable[[TrainEvent], None]]:
    """A callback for :func:`gfnode_fast.training.train`."""
    notes: dict[str, str] = {}
    with step_progress("step") as show:

        def on_event(event: TrainEvent) -> None:
            if event.note:
                say(event.note)
            if event.kind == "train":
                notes["loss"] = f"loss {event.values['loss']:.4f}"
            if event.kind == "validation":
                notes["validation"] = f"validation {event.values['val_mse']:.4f}{_each(event)}"
            note = "  ".join((f"epoch {event.epoch}", *notes.values()))
            show(event.step, event.total_steps, note)

        yield on_event


def _each(event: TrainEvent) -> str:
    """The validation errors of each of several molecules."""
    parts = [
        f"{name.removeprefix(OF_MOLECULE)} {value:.4f}"
        for name, value in event.values.items()
        if name.startswith(OF_MOLECULE)
    ]
    return f" ({', '.join(parts)})" if parts else ""


def say_training(result: TrainResult) -> None:
    """How a training ended."""
    ended = {
        "completed": "completed",
        "early_stopped": "stopped early: no improvement within the patience",
        "max_steps": "stopped at max_steps",
        "max_seconds": "stopped at max_seconds",
        "interrupted": "interrupted",
    }[result.status]
    say(f"training {ended}: {result.step} steps, {result.epoch} epochs, {result.seconds:.0f} s")
    if result.best_mse is not None:
        say(f"best validation error {result.best_mse:.4f} Å² after epoch {result.best_epoch}")
    say(f"run: {result.output}")
    if result.status in ("max_steps", "max_seconds", "interrupted"):
        without_limit = " --max_steps null" if result.status == "max_steps" else ""
        say(f"go on with: gfnode-fast train --resume {result.output}{without_limit}")


def say_report(report: Report) -> None:
    """The errors beside the baselines', as a table."""
    horizon = report.horizon_fs[-1] / 1000
    say(
        f"mean squared error per coordinate (Å²), {report.num_windows} {report.split} windows of "
        f"{report.trajectory}, {report.num_timesteps} times up to {horizon:g} ps"
    )
    rows = [
        [
            "GF-NODE" if name == MODEL else name,
            f"{report.mse[name]:.4f}",
            f"{report.mse_last[name]:.4f}",
            f"{100 * (report.mse[name] / report.mse[NOTHING_MOVES] - 1):+.1f} %",
        ]
        for name in PREDICTORS
    ]
    say_table(("", "all times", "last time", "against nothing moves"), rows)
    if report.molecules:
        own = [
            (
                name,
                str(one.num_windows),
                f"{one.mse[MODEL]:.4f}",
                f"{one.mse_last[MODEL]:.4f}",
                f"{100 * (one.mse[MODEL] / one.mse[NOTHING_MOVES] - 1):+.1f} %",
            )
            for name, one in report.molecules.items()
        ]
        header = ("GF-NODE on", "windows", "all times", "last time", "against nothing moves")
        say_table(header, own)
    for title, unit, values in (
        ("bond lengths", "Å", report.bond_lengths),
        ("bond angles", "°", report.bond_angles),
    ):
        if values is not None:
            say(
                f"  {title}: Wasserstein distance to the true distribution "
                f"{values.wasserstein:.3g} {unit}, Jensen-Shannon {values.jensen_shannon:.3f} bit"
            )


def say_agreement(agreement: Agreement) -> None:
    """Errors and speed of the fast model against the reference."""
    arguments = agreement.arguments
    say(f"checkpoint: {agreement.checkpoint}")
    known = [f"{k}={v}" for k, v in arguments.items() if k not in agreement.assumed]
    say("from the weights: " + ", ".join(known))
    say("from the options: " + ", ".join(f"{k}={arguments[k]}" for k in agreement.assumed))
    say(f"backend: {agreement.backend} ({agreement.backend_reason})")
    say(
        f"largest difference, relative to the largest value, over {agreement.batch_size} windows "
        f"of {agreement.trajectory} on {agreement.device}"
    )
    rows = [
        [
            name,
            f"{error:.2e}",
            f"{agreement.rounding[name]:.2e}" if name in agreement.rounding else "not comparable",
        ]
        for name, error in agreement.errors.items()
    ]
    say_table(("output", "fast - reference", "reference: float32 - float64"), rows)
    ratio = agreement.reference_ms / agreement.fast_ms
    say(
        f"forward pass: reference {agreement.reference_ms:.1f} ms, "
        f"fast {agreement.fast_ms:.1f} ms, ratio {ratio:.2f}"
    )
    say("they agree" if agreement.passed else "THEY DIFFER by more than rounding explains")


def say_nested(values: dict[str, Any], indent: str = "") -> None:
    """Nested plain values as indented lines."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            say(f"{indent}{name}:")
            say_nested(value, indent + "  ")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value):
            say(f"{indent}{name}:")
            for item in value:
                say_nested(item, indent + "  ")
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], str):
            say(f"{indent}{name}:")
            for item in value:
                say(f"{indent}  {item}")
        else:
            say(f"{indent}{name}: {_plain(value)}")


def _plain(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
