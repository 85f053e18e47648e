"""Predictions, scores and tables."""
