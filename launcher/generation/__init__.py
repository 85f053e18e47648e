"""Texts written by models: on workers, without a run, or for one question."""
