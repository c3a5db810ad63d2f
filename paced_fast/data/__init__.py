"""What a run reads and what flows through it: tasks, data sources, prompts, packed batches."""
