"""Export models to files that run without this package."""
