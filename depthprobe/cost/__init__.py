"""Cost: parameters, FLOPs, time."""
