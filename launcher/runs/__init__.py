"""A run's folder: paths, settings, ownership, journal, ledger, signals, progress, status."""
