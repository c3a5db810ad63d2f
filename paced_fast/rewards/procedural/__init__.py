"""Tasks of reasoning-gym, judged by our own rules or by the package's checkers in a sandbox."""
