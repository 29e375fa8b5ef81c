"""Benchmarks with the peer beside ours in one process; run by ``make bench``, never by pytest."""
