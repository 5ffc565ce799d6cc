"""What every room stands on: files, errors, types, devices and processes, progress; no networks."""
