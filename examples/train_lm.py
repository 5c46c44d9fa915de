"""Trains a byte-level transformer under MuonClip, Muon or AdamW, and plots what QK-clip did.

    python examples/train_lm.py
    python examples/train_lm.py --optimizer adamw --data my_texts/
    python examples/train_lm.py --aot-topology v5p:2x2x1

Everything lands in one run folder: metrics.jsonl, TensorBoard events, summary.json, three plots and
the checkpoints. Exit codes: 0 done, or stopped by SIGTERM or SIGINT after saving; 2 bad input;
1 failed while running.
"""

import contextlib
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence

from lm import config as settings, extras
from lm.stop import StopFlag

try:
    from lm import data, rundir
except ModuleNotFoundError as error:  # NumPy, which comes with muonclip-jax
    settings.refuse(extras.not_installed(error.name or "muonclip-jax"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
      arguments: Flags and values; None takes those of the process.

    Returns:
      Exit code.
    """
    config = settings.parse(arguments)
    stop = StopFlag()
    try:
        extras.check()
        config = rundir.resumed(config)
        if config.aot_topology is not None:
            print(compile_ahead(config))
            return 0
        corpus = data.load(config.data, config.seq_len)
        if config.mesh or config.simulate_devices or config.distributed:
            return train_on_devices(config, corpus, stop)
        return train(config, corpus, rundir.open_run(config, corpus), stop)
    except settings.BadInput as error:
        settings.refuse(error)


def train_on_devices(config: settings.Config, corpus: data.Corpus, stop: StopFlag) -> int:
    """Trains after a look at the devices: a mesh that they do not fit makes no run folder.

    Args:
      config: Settings.
      corpus: Text.
      stop: True once the user wants to stop.

    Returns:
      Exit code.
    """
    from lm import mesh, processes

    processes.start(config)
    silence = contextlib.nullcontext() if processes.is_first() else quietly()
    with processes.ending_together(), silence:
        mesh.make(config.mesh)
        processes.check_agreement(config, corpus)
        run = processes.from_first(lambda: rundir.open_run(config, corpus))
        return processes.leave(train(config, corpus, run, stop))


def train(config: settings.Config, corpus: data.Corpus, run: rundir.Run, stop: StopFlag) -> int:
    """Trains, and tells how it ended.

    Args:
      config: Settings.
      corpus: Text.
      run: Run folder.
      stop: True once the user wants to stop.

    Returns:
      Exit code.
    """
    path = run.path
    if run.done:
        print(f"{path}: this run has ended; nothing was changed")
        return 0
    # Not at the top: a refusal of a flag or a file should not wait for JAX.
    from lm.training import Failed, Trainer, make_model

    with quietly() if config.quiet else contextlib.nullcontext():
        print(
            f"training {config.model} with {config.optimizer} on {corpus.name}; writing to {path}"
        )
        if corpus.skipped:
            files = "file that is" if corpus.skipped == 1 else "files that are"
            print(f"left out {corpus.skipped} {files} not text")
        made = Trainer(config, corpus, path, make_model(config), lambda: bool(stop))
        try:
            done = made.train()
        except Failed as error:
            print(f"train_lm.py: {path}: {error}", file=sys.stderr)
            return 1
    if not (path / rundir.SUMMARY).exists():
        print(f"stopped after step {done}; continue with: {resume_command(config, path)}")
        return 0
    lines = report(path, made.speed.tokens_per_second)
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
    words = [_from_here(sys.executable), _from_here(__file__), "--resume", "--out", str(path)]
    if config.distributed is not None:
        address, count, _ = config.distributed
        words += (
            ["--distributed"] if address is None else ["--distributed", f"{address},{count},RANK"]
        )
    return shlex.join(words)


def _from_here(path: str) -> str:
    """Shortens a path that is below the working directory."""
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Prints nothing to stdout."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def compile_ahead(config: settings.Config) -> str:
    """Says what a step would cost on a TPU slice; reads no text and writes nothing."""
    from lm import ahead
    from lm.training import make_model

    return ahead.report(config, make_model(config))


def report(path: pathlib.Path, tokens_per_second: float | None) -> list[str]:
    """Says in a few lines how a run ended.

    Args:
      path: Run folder.
      tokens_per_second: Of its last start; None if that was too short to tell.

    Returns:
      Lines, the most important first.
    """
    from lm.plots import PLOTS

    metrics = rundir.read_metrics(path)
    summary = json.loads((path / rundir.SUMMARY).read_bytes())
    clipping = sum(line["heads_clipped"] > 0 for line in metrics)
    speed = f", {tokens_per_second:,.0f} bytes/s" if tokens_per_second else ""
    return [
        f"validation loss {summary['validation_loss']:.3f} nats per byte"
        f" after {summary['steps']} steps on {summary['tokens']:,} bytes"
        f" in {summary['seconds']:.0f} s{speed}",
        f"largest attention logit {max(line['max_logit'] for line in metrics):.1f};"
        f" {metrics[-1]['heads_ever_clipped']} heads were ever clipped,"
        f" in {clipping} of {len(metrics)} logged steps",
        *(str(path / plot) for plot in PLOTS),
    ]


if __name__ == "__main__":
    sys.exit(main())
