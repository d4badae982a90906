"""What a model's own inputs tell, so that its weights are quantized better."""
