"""The command line and what only it and the demo need."""
