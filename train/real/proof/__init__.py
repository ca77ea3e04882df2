"""The proof with real models: the four systems on the same bases, data, steps and order, and what they answer."""
