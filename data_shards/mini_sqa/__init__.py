"""MiniSQA, the embedded data set, drawn on the spot."""
