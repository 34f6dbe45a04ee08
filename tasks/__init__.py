"""Task suites: how rows are built, how prompts are rendered and how answers are scored. Imports no model."""
