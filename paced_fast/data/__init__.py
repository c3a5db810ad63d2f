"""Inputs of a run and the records that flow through it: tasks, data sources, prompts, packed batches."""
