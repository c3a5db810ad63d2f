"""How a run comes to be: its folder, tables, model, generator, resume, signals, watchdog."""
