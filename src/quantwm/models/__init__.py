"""World models: the DINOv2 encoder, the ViT predictor, DINO-WM, and loading them."""
