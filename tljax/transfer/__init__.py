"""What to train, and training it."""
