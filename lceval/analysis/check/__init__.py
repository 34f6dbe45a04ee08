"""`lceval check`: regression gate for CI with a paired statistical test."""
