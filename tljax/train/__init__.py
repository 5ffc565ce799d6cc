"""Training: recipes, phases, epochs, steps, checkpoints and run directories."""
