"""Rewards: speed, verdicts, isolation."""
