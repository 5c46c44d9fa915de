"""Trains a byte-level transformer under MuonClip, Muon or AdamW, and plots what QK-clip did.

    python -m examples.language_model

`program` is the command line: it reads the settings (`config`) and the text (`data`), neither of
which needs JAX, and starts the training loop. `models` holds the networks, `training` the train
step, the loop and the devices it runs on, `run_folder` everything that a run writes and reads back,
and `measurement` the cost of a step on hardware that need not be attached. Imports go one way:
`models`, then `run_folder`, `training`, `measurement`, `program`.
"""
