"""Files in, uint8 batches out: ``sources`` finds examples, ``decode`` reads one, ``loader`` many.

Nothing is imported here: ``loader`` brings in grain, which the others do not need.
"""
