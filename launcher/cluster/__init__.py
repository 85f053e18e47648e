"""Ray: the session, workers, their queue, GPUs, job submission. Knows no stage."""
