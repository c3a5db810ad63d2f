"""The parts of the benchmark `sample_efficiency`: suites, arms, runs, their files, statistics, tables."""
