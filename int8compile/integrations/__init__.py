"""What connects int8compile with other libraries. Each module imports its library, so import it only where that is."""
