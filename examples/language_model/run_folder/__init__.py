"""Everything that a run writes to its folder and reads back.

`opening` chooses the folder and compares its settings, `files` names its files and writes them
atomically, `checkpoint` saves and restores the state with the digests of `digests`, `journal` logs
the metrics of each step, also as TensorBoard events (`events`) and as progress on the terminal
(`progress`), `profiler` records traces, and `plots` draws the figures.
"""
