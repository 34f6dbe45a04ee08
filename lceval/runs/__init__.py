"""Runs: one evaluation, the demo, and sweeps."""
