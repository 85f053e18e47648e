"""Accuracy by class, and scores of rationales."""
