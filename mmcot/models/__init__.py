"""The fused models, their parts, loss, FLOPs and attention maps."""
