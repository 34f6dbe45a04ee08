"""Estimates with intervals, paired tests and agreement."""
