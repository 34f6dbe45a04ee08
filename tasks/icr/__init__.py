"""In-context retrieval: the answer is in one of many passages."""
