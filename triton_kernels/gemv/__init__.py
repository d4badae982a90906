"""One row times a weight."""
