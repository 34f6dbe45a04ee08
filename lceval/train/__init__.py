"""`lceval train`: recipes to adapters, the data they learn from, and what the adapters are worth."""
