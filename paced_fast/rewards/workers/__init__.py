"""Processes that judge texts, and time limits for functions that stay in this one."""
