"""Tasks of reasoning-gym, judged by rules of ours or by its checkers in a sandbox."""
