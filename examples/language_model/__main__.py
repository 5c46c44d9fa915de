"""Runs the training program: `python -m examples.language_model`, from the repository root."""

import sys

from examples.language_model.program import main

if __name__ == "__main__":
    sys.exit(main())
