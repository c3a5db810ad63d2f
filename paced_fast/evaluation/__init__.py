"""Held-out evaluation: runs of it, estimators of pass@k and maj@k, calibration of the value."""
