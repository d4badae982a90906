"""Many rows times a weight."""
