"""The parts of ``benchmarks/gpu_proof.py``: a function each, from its size to what it found and to its checks.

golden(Proof(tiny=True))     # {"relative_errors": {...}, "checks": {"...: encoder within 1e-05 of float64": True}}

``checks`` contains what must be true. The tests of tests/gpu call the same functions. Neither Ray nor MLflow is
imported here. Common: machine.py (device, times, waits), models.py (models, blocks), jobs.py (a training's data).
"""
