"""The parts of the training program `train_lm.py`: settings, text, models, checkpoints, plots."""
