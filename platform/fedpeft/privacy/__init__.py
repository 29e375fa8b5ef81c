"""What keeps one site's rows from the others and from the coordinator (see README.md)."""
