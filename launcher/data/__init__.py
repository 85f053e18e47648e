"""The data step: from a data set to the shared data folder."""
