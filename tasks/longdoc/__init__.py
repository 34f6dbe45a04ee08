"""Long documents: whole stories and whole books."""
