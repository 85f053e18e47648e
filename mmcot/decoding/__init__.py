"""Generating texts."""
