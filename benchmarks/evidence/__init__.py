"""The claims of the papers, tried in small: who trains what, and what came out.

    python -m benchmarks.evidence                      # lists the experiments
    python -m benchmarks.evidence exploding-logits     # one of them; or all

`tasks.py` has what takes time, a training or a timing, and remembers it; each experiment is a file
that says which trainings it needs, what it reads off them, when the claim counts as reproduced, and
how it is drawn. docs/evidence.md tells the results.
"""

import pathlib

FOLDER = pathlib.Path(__file__).parent
