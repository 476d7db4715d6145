"""Trajectories: collecting them, storing them, and caching their latents for training."""
