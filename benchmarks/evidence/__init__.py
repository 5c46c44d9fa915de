"""Small trainings that test published claims about Muon and QK-clip.

    python -m benchmarks.evidence --help               # lists the experiments
    python -m benchmarks.evidence exploding-logits     # runs one of them; or all
    python -m benchmarks.evidence page                 # generates docs/evidence.md

`training.py` has one training, whose record is stored and used again. Each experiment is a module:
its trainings, the figures computed from their records, the condition under which a claim counts as
reproduced, and the plot. docs/evidence.md has the results.
"""

import pathlib

FOLDER = pathlib.Path(__file__).parent
