"""The published system's commands."""
