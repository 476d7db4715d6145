"""Planning with a world model: costs, the cross-entropy method, receding-horizon control."""
