"""The command line: reads the settings and the text, trains, and reports the result.

Exit codes: 0 the run is complete, or was stopped by SIGTERM or SIGINT and saved; 2 bad input;
1 the run failed.
"""

import contextlib
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence

from examples.language_model import config as settings, requirements
from examples.language_model.training.stop import StopFlag

try:
    from examples.language_model import data
    from examples.language_model.run_folder import files, opening
except ModuleNotFoundError as error:  # NumPy, a dependency of JAX
    settings.exit_with(requirements.not_installed(error.name or "muonclip-jax"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
      arguments: Flags and values; None reads the arguments of the process.

    Returns:
      Exit code.
    """
    config = settings.parse(arguments)
    stop = StopFlag()
    try:
        requirements.check()
        config = opening.resumed(config)
        if config.aot_topology is not None:
            print(compile_ahead(config))
            return 0
        if config.analyze:
            print(analysis(config))
            return 0
        corpus = data.load(config.data, config.seq_len)
        if config.mesh or config.simulate_devices or config.distributed:
            return train_on_devices(config, corpus, stop)
        return train(config, corpus, opening.open_run(config, corpus), stop)
    except settings.BadInput as error:
        settings.exit_with(error)


def train_on_devices(config: settings.Config, corpus: data.Corpus, stop: StopFlag) -> int:
    """Trains on a mesh; if the mesh does not fit the devices, no run folder is created.

    Args:
      config: Settings.
      corpus: Text.
      stop: True after a signal.

    Returns:
      Exit code.
    """
    from examples.language_model.training import mesh, processes

    processes.start(config)
    silence = contextlib.nullcontext() if processes.is_first() else quietly()
    with processes.exit_together(), silence:
        mesh.make_mesh(config.mesh)
        processes.check_agreement(config, corpus)
        run = processes.open_on_first(lambda: opening.open_run(config, corpus))
        return processes.exit_code(train(config, corpus, run, stop))


def train(config: settings.Config, corpus: data.Corpus, run: opening.Run, stop: StopFlag) -> int:
    """Trains and prints the result.

    Args:
      config: Settings.
      corpus: Text.
      run: Run folder.
      stop: True after a signal.

    Returns:
      Exit code.
    """
    path = run.path
    if run.complete:
        print(f"{path}: the run is already complete; nothing was changed")
        return 0
    # Not at the top: an error in a flag or a file should be reported before JAX is imported.
    from examples.language_model.training.loop import Trainer, make_model

    with quietly() if config.quiet else contextlib.nullcontext():
        print(f"training {config.model} with {config.optimizer} on {corpus.name}; output: {path}")
        if corpus.skipped:
            plural = "file that is" if corpus.skipped == 1 else "files that are"
            print(f"skipped {corpus.skipped} {plural} not text")
        trainer = Trainer(config, corpus, path, make_model(config), lambda: bool(stop))
        try:
            step = trainer.train()
        except settings.Failed as error:
            print(f"{settings.NAME}: {path}: {error}", file=sys.stderr)
            return 1
    if not (path / files.SUMMARY).exists():
        print(f"stopped after step {step}; to resume: {resume_command(config, path)}")
        return 0
    lines = report(path, trainer.speed.tokens_per_second)
    print(*lines[:1] if config.quiet else lines, sep="\n")
    return 0


def resume_command(config: settings.Config, path: pathlib.Path) -> str:
    """Returns the command that resumes a run; the other settings are in its folder.

    Args:
      config: Settings.
      path: Run folder.

    Returns:
      A shell command for the working directory of this process. With several processes, each
      replaces RANK by its own.
    """
    words = [_relative(sys.executable), "-m", settings.MODULE, "--resume", "--out", str(path)]
    if config.distributed is not None:
        address, count, _ = config.distributed
        words += (
            ["--distributed"] if address is None else ["--distributed", f"{address},{count},RANK"]
        )
    return shlex.join(words)


def _relative(path: str) -> str:
    """Shortens a path that is below the working directory."""
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Discards what is printed to stdout."""
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):
        yield


def compile_ahead(config: settings.Config) -> str:
    """Returns the cost of a step on `--aot-topology`; reads no text and writes no file."""
    from examples.language_model.measurement import ahead
    from examples.language_model.training.loop import make_model

    return ahead.report(config, make_model(config))


def analysis(config: settings.Config) -> str:
    """Returns what the program of the model shows; reads no text and writes no file."""
    from examples.language_model.measurement import analysis
    from examples.language_model.training.loop import make_model

    return analysis.report(config, make_model(config))


def report(path: pathlib.Path, tokens_per_second: float | None) -> list[str]:
    """Summarizes a complete run.

    Args:
      path: Run folder.
      tokens_per_second: Throughput of this process; None if it logged fewer than two steps.

    Returns:
      Lines, the most important first.
    """
    from examples.language_model.run_folder.plots import PLOTS

    metrics = files.read_metrics(path)
    summary = json.loads((path / files.SUMMARY).read_bytes())
    clipping = sum(line["heads_clipped"] > 0 for line in metrics)
    speed = f", {tokens_per_second:,.0f} bytes/s" if tokens_per_second else ""
    return [
        f"validation loss {summary['validation_loss']:.3f} nats per byte"
        f" after {summary['steps']} steps on {summary['tokens']:,} bytes"
        f" in {summary['seconds']:.0f} s{speed}",
        f"largest attention logit {max(line['max_logit'] for line in metrics):.1f};"
        f" QK-clip scaled {metrics[-1]['heads_ever_clipped']} heads,"
        f" in {clipping} of {len(metrics)} logged steps",
        *(str(path / plot) for plot in PLOTS),
    ]
