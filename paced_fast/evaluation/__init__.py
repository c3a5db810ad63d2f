"""Held-out evaluation: sampling and scoring, estimators of pass@k and maj@k, calibration of the value."""
