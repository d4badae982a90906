"""Multiply many rows with a weight."""
