"""What a frozen network makes of a data set: extract it, keep it, fit a linear probe to it."""
