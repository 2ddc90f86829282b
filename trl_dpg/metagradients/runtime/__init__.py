"""What a run needs that the paper does not speak of: examples, memory, processes, the model's state."""
