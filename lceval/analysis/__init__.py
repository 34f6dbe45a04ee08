"""What follows from finished runs: tables, checks, reports, scores of other systems' predictions."""
