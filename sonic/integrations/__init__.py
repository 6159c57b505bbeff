"""Adapters to other packages. Each is optional and imports its package only when it is used."""
