"""Arrays in, numbers out: accuracies, losses and calibration; knows no network and no file."""
