"""Structured pruning: importance of units, the shape of a wanted size, and the cut."""
