"""Ray Tune: trials, the search space, ablations, plots."""
