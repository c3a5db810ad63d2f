"""Records of a run: files, loggers, terminal."""
