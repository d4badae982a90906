"""Rows in groups times a weight for each group, in one launch."""
