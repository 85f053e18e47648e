"""The data step: building the shared data folder from a data set."""
