"""Mathematical answers, judged by value."""
