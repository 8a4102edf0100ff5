"""What a bound transformer holds between its calls."""
