"""What `benchmarks.tables` writes into pages: one function for each section, from a result to Markdown."""
