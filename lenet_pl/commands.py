"""The commands: each is a plain function."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lenet_pl import process, runs
from lenet_pl.atomic import write_atomic
from lenet_pl.callbacks import rounded_metrics
from lenet_pl.cli import CLI
from lenet_pl.console import format_metric, say
from lenet_pl.errors import Failure, UsageError, tell
from lenet_pl.module import LitLeNet
from lenet_pl.names import one_line, quoted
from lenet_pl.start import Start


def fit(cli: CLI) -> None:
    """Trains, scores the chosen checkpoint on the test images, and writes the report."""
    writer = cli.run_writer
    if writer is None:  # fast_dev_run and barebones leave nothing
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.start.path)
        return
    if cli.is_finished:
        folder = writer.create()
        say(f"{folder} is finished: {(folder / runs.FINISHED).read_text('utf-8').strip()}")
        if not cli.config.test or (folder / runs.SCORE).is_file():
            return
    else:
        try:
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.start.path)
            folder = writer.finish(cli.trainer)
        finally:
            if cli.trainer.global_step <= cli.start.checkpoint.get("global_step", 0):  # no step was taken
                writer.discard()
    if not cli.trainer.checkpoint_callbacks:  # without checkpoints there is nothing to score
        say(f"run folder: {one_line(folder)}")
        return
    path = runs.scored_checkpoint(folder)
    if path is None:
        raise Failure("the training ended before its first epoch was finished, so there is nothing to score")
    if cli.config.test:
        cli.start = Start(path)
        cli.model = LitLeNet.load(path)
        report(cli)
        test(cli)  # last: once a finished run has a score, ``auto`` does nothing more
    command = f"python -m lenet_pl test --ckpt_path {quoted(path)}"
    say(f"run folder: {one_line(folder)}\nnext: {one_line(command)}")


def validate(cli: CLI) -> None:
    """Scores a checkpoint on the validation images."""
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    metrics = rounded_metrics(cli.trainer)
    say("  ".join(f"{name} {format_metric(name, metrics[name])}" for name in ("val_acc", "val_loss")))


def test(cli: CLI) -> None:
    """Scores a checkpoint on the test images, prints the accuracy, and writes test.json if it has used all of them."""
    assert cli.start.path is not None
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    metrics = rounded_metrics(cli.trainer)
    result: dict[str, Any] = {name: metrics[name] for name in ("test_acc", "test_loss")}
    result |= {"n": int(metrics["n"]), "ckpt_path": str(cli.start.path), "seed": cli.config.seed_everything}
    if cli.trainer.is_global_zero:
        try:
            if result["n"] == len(cli.datamodule.test_set[1]):  # not with trainer.limit_test_batches
                folder = runs.folder_of(cli.start.path) or runs.beside(cli.start.path)
                write_atomic(folder / runs.SCORE, (json.dumps(result, indent=2) + "\n").encode())
        finally:
            print(f"Test accuracy: {result['test_acc']:.2%}  (loss {result['test_loss']:.4f}, {result['n']} images)")


def predict(cli: CLI) -> None:
    """Classifies the user's pictures, or the test images."""
    from lenet_pl.apps import predict as app

    batches: Any = cli.trainer.predict(cli.model, datamodule=cli.datamodule)
    app.write(Path(cli.config.output or "."), cli.datamodule, torch.cat(batches))


def report(cli: CLI) -> None:
    """Writes report.html and its pictures, for which a checkpoint is enough."""
    from lenet_pl.apps import report as app

    assert cli.start.path is not None
    if cli.trainer.is_global_zero:
        cli.model.to(cli.trainer.strategy.root_device)
        print(f"report: {one_line(app.write(cli.start.path, cli.model, cli.datamodule))}")


def export(cli: CLI) -> None:
    """Writes the net as an ONNX file, which other programs can run."""
    from lenet_pl.apps import export as app

    assert cli.start.path is not None
    app.write(cli.start.path, cli.model, cli.datamodule, cli.config.output)


def demo(cli: CLI) -> None:
    """Serves the page until Ctrl-C."""
    from lenet_pl.apps import demo as app

    app.serve(cli.model, cli.datamodule, cli.config.port)


_FUNCTIONS = {function.__name__: function for function in (fit, validate, test, predict, report, export, demo)}


def run(command: str, args: list[str]) -> int:
    """Runs one command and returns its exit code: 0, 1, 2, or above 128 for a signal."""
    process.quiet()
    cli = None
    try:
        cli = CLI(command, args)
        try:
            _FUNCTIONS[command](cli)
        except BaseException:
            _end_other_processes(cli.trainer)
            raise
    except SystemExit as leave:  # a signal, --help, --print_config, or a callback
        if isinstance(leave, process.Stopped) and command == "fit":
            say(f"stopped by {leave.name}{_how_to_go_on(cli)}", file=sys.stderr)
        if isinstance(leave.code, str):
            return tell(Failure(leave.code), 1)
        return int(leave.code or 0)
    except BrokenPipeError:  # nobody reads the output any more (``| head``): __main__ handles that
        raise
    except Exception as error:
        return tell(error, 2 if isinstance(error, UsageError) else 1)
    return 0


def _end_other_processes(trainer: Trainer) -> None:
    """Kills the processes that Lightning has started. They have nothing to save, and may wait for this one for ever."""
    started: list[Any] = getattr(trainer.strategy.launcher, "procs", [])
    for other in started:
        other.kill()
        other.wait()
    started.clear()  # Lightning kills this process, too, if it finds one there that has failed


def _how_to_go_on(cli: CLI | None) -> str:
    """Returns the end of a sentence that says how to resume a stopped training."""
    if cli is None or cli.run_writer is None:
        return ""
    folder = cli.run_writer.path
    if folder is None or not (folder / runs.LAST).is_file():
        return " before the first epoch was finished; start the run again"
    return f"; resume with: python -m lenet_pl fit --ckpt_path {quoted(folder / runs.LAST)}"
