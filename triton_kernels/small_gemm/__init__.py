"""A few rows times a weight."""
