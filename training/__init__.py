"""Adapters for long-context models."""
