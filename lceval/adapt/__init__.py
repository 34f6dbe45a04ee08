"""`lceval train`: training data, training, and evaluation of adapters."""
