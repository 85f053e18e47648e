"""The steps of a run in their order, and the checks before the first."""
