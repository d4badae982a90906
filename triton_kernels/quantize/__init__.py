"""Quantize activations to int8, with second digits for outliers."""
