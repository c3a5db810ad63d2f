"""Runs and steps of training."""
