"""What people look at after a run: pictures, plots, and the page that holds them all."""
