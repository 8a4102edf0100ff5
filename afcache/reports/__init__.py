"""What the last run did: a table, JSON, a plot."""
