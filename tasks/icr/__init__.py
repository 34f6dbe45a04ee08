"""In-context retrieval: the answer is stated in one of many passages."""
