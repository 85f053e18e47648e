"""Commands of the published system."""
