"""Programs judged by running tests in a sandbox."""
