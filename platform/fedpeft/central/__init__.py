"""Training of many tasks' adapters at once over ranks (see README.md). Importing this imports no torch."""
