"""Foundation of all other packages: files, errors, types, devices, processes and progress bars."""
