"""Specialisation and routing on real data (see README.md)."""
