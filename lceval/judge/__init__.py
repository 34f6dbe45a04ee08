"""LLM-as-judge metrics: rubrics, judges (endpoint, local model, rule), and their agreement with human labels."""
