"""Benchmarks of rewards: speed, correctness, isolation."""
