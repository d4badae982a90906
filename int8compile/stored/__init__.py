"""Models that are int8 in memory and on disk."""
