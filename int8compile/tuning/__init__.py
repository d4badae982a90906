"""What is measured on a model to quantize it better."""
