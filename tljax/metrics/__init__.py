"""Accuracy, loss and calibration metrics: functions from arrays to numbers."""
