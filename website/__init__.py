"""The web site: `python -m website` builds it from docs/, README, notebooks and docstrings."""
