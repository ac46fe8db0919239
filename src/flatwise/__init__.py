"""flatwise: sharpness-aware training for PyTorch, exact to the bit."""
