"""Text generation: on workers, without a run, or for one question."""
