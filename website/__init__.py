"""The web site: `python -m website` builds it from docs/, the README, the notebooks and docstrings."""
