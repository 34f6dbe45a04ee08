"""Training of adapters for long-context models."""
