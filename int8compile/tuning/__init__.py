"""Calibration: statistics of a model's inputs, with which its weights are quantized better."""
