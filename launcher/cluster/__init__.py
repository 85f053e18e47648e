"""Ray: the session, workers, their queue, GPUs, job submission; independent of the stages."""
