"""The folder of a run: paths, settings, ownership, journal, ledger, signals, progress, status."""
