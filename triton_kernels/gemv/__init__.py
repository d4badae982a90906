"""Multiply one row with a weight."""
