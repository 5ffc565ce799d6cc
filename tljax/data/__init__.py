"""Data loading: ``sources`` finds examples, ``decode`` reads one, ``loader`` makes batches.

Nothing is imported here, because ``loader`` imports grain, which the others do not need.
"""
