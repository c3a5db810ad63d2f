"""Answers to mathematics, judged by value."""
