"""The fused loss beside its peers."""
