"""What is logged to MLflow, how it is sent, the model registry and the server."""
