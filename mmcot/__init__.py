"""The method: a T5 that sees, writes its reasons down, then answers.

Multimodal-CoT (arXiv:2302.00923) in torch and transformers. This package knows
nothing of clusters, shard files, configuration files or experiment tracking.
"""
