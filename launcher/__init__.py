"""The infrastructure: Ray, DeepSpeed, MLflow and the command line.

The only package that may import ``ray``, ``deepspeed``, ``mlflow`` or ``typer``. It
imports both ``mmcot`` and ``data_shards`` and passes plain functions to them.
"""
