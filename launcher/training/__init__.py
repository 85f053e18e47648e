"""The training loop, its DeepSpeed engine, checkpoints, loading, and how ranks are launched."""
