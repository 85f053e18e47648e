"""The inputs of a stage: the data folder, samples, token lengths, plan, jobs, and its initial model."""
