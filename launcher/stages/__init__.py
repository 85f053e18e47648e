"""What a stage reads: the data folder, samples, token lengths, plan, jobs, and the model it starts from."""
