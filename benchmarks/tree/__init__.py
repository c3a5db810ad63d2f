"""The priority tree beside its peers."""
