"""Multiply rows, at about float32's precision, with an int8 weight."""
