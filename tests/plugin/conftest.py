# The project of a user: its conftest.py is for a pytest of its own.
collect_ignore = ["project"]
