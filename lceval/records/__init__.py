"""Runs on disk: their identity, their stored responses, and how they are read."""
