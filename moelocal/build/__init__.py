"""Models made here: converted, quantized, pruned."""
