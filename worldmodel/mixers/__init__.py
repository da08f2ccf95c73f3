"""What carries memory from frame to frame in a layer of M."""
