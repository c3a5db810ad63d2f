"""Worker processes that judge texts, and time limits for functions that run in this process."""
