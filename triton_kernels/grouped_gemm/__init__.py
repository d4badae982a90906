"""Multiply groups of rows with a weight per group, in one launch."""
