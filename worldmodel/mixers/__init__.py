"""What carries memory from frame to frame."""
