"""What planning costs on this machine, against the order in which DINO-WM computes it."""
