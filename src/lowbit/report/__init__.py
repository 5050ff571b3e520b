"""One HTML page that compares runs."""
