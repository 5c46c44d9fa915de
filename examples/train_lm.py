"""Trains a byte-level transformer under MuonClip, Muon or AdamW, and plots what QK-clip did.

    python examples/train_lm.py
    python examples/train_lm.py --optimizer adamw --data my_texts/
    python examples/train_lm.py --aot-topology v5p:2x2x1

Everything lands in one run folder: metrics.jsonl, summary.json, loss.png, max_logits.png and the
checkpoints. Exit codes: 0 done, or stopped by SIGTERM or SIGINT after saving; 2 bad input;
1 failed while running.
"""

import json
import pathlib
import sys
from collections.abc import Sequence

from lm import config as settings, data, rundir
from lm.stop import StopFlag


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
        if config.aot_topology is not None:
            print(compile_ahead(config))
            return 0
        corpus = data.load(config.data, config.seq_len)
        run = rundir.open_run(config, corpus)
        if run.done:
            print(f"{run.path}: this run has ended; nothing was changed")
            return 0
        return train(config, corpus, run.path, stop)
    except settings.BadInput as error:
        settings.refuse(error)


def train(config: settings.Config, corpus: data.Corpus, path: pathlib.Path, stop: StopFlag) -> int:
    """Trains, and tells how it ended.

    Args:
      config: Settings.
      corpus: Text.
      path: Run folder.
      stop: True once the user wants to stop.

    Returns:
      Exit code.
    """
    # Not at the top: a refusal of a flag or a file should not wait for JAX.
    from lm.training import MODELS, Failed, Trainer

    print(f"training {config.model} with {config.optimizer} on {corpus.name}; writing to {path}")
    if corpus.skipped:
        files = "file that is" if corpus.skipped == 1 else "files that are"
        print(f"left out {corpus.skipped} {files} not text")
    try:
        done = Trainer(config, corpus, path, MODELS[config.model](), lambda: bool(stop)).train()
    except Failed as error:
        print(f"train_lm.py: {path}: {error}", file=sys.stderr)
        return 1
    ended = (path / rundir.SUMMARY).exists()
    print(report(path) if ended else f"stopped after step {done}; --resume --out {path} goes on")
    return 0


def compile_ahead(config: settings.Config) -> str:
    """Says what a step would cost on a TPU slice; reads no text and writes nothing."""
    from lm import ahead
    from lm.training import MODELS

    return ahead.report(config, MODELS[config.model]())


def report(path: pathlib.Path) -> str:
    """Says in a few lines how a run ended."""
    metrics = rundir.read_metrics(path)
    summary = json.loads((path / rundir.SUMMARY).read_bytes())
    clipping = sum(line["heads_clipped"] > 0 for line in metrics)
    return (
        f"validation loss {summary['validation_loss']:.3f} nats per byte"
        f" after {summary['steps']} steps on {summary['tokens']:,} bytes"
        f" in {summary['seconds']:.0f} s\n"
        f"largest attention logit {max(line['max_logit'] for line in metrics):.1f};"
        f" {metrics[-1]['heads_ever_clipped']} heads were ever clipped,"
        f" in {clipping} of {len(metrics)} logged steps\n"
        f"{path / 'loss.png'}\n{path / 'max_logits.png'}"
    )


if __name__ == "__main__":
    sys.exit(main())
