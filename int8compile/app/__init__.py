"""The command line, with the demo and what else only it needs."""
