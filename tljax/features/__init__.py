"""Features of data sets under frozen networks: extraction, cache, evaluation, linear probes."""
