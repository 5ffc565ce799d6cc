"""The names that others give to tensors, and ours: a table for each family and layout."""
