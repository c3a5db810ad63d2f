"""Kernels of the priority tree, and their arithmetic in torch."""
