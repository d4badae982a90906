"""Activations to int8, and their outliers to digits."""
