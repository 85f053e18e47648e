"""Questions, prompts, answers, token ids."""
