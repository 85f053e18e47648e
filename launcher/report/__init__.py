"""A run's HTML page."""
