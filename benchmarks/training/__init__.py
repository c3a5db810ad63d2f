"""Benchmarks of training runs and steps."""
