"""From a network, images and options to a trained network: recipes, epochs, steps, runs."""
