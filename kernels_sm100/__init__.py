"""Implementation package of sonic; not an API."""
