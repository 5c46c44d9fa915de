"""Deliberate faults in the package, each of which a test that runs by day has to see."""
