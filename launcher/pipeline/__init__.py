"""The steps of a run in their order, and what is checked before the first."""
