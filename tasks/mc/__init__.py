"""Multiple choice over one long text."""
