"""Fused loss compared with its peers."""
