"""The engine's own environment: environments.py says where it is and what is in it, install.py makes it.

May import: plan, events, errors.
"""
