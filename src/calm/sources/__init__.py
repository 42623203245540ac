"""Weights: fetched through the user's own indexes, resumed, concatenated, verified, cached by content."""
