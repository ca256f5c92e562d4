"""One file per experiment of the paper; run from a clone."""
