"""Parts of a visit to a GPU; `benchmarks.gpu_visit` runs them."""
