"""Training: the command line, the construction of a run, the loop, and its callbacks."""
