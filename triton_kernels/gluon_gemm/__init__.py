"""Multiply many rows with a weight on sm_90, in Gluon."""
