"""Judging schemes: what runs attention to see how well it does."""
