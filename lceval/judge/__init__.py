"""Judged metrics: rubrics, judges (an endpoint, a local model, a rule), and what they are worth against people."""
