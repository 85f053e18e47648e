"""Logging to MLflow, sending, the model registry and the server."""
