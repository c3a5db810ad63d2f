"""The priority tree's kernels and their arithmetic in torch."""
