"""Float rows times an int8 weight."""
