"""Long-context evaluation over compressed KV caches, as an extension of lm-evaluation-harness."""

__version__ = "0.1.0"
