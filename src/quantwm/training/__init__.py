"""Training DINO-WM's predictor on cached latents."""
