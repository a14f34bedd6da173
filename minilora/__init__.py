"""minilora: LoRA from scratch in plain NumPy, exact enough to check other implementations against."""
