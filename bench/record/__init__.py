"""What every benchmark shares: one clock, one quartile, one writer of results, and their tables."""
