"""Training of scorers of KV slots (`lceval.models.scorer`), and the shipped recipes: `lceval train scorer NAME`."""
