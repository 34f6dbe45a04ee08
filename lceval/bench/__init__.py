"""Benchmarks on this machine; all sides are measured in one run, so that results are ratios."""
