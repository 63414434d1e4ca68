"""The plan in other forms: shell.py, a script."""
