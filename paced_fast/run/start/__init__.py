"""Start of a run: its folder, tables, model, generator, resume, signals, watchdog."""
