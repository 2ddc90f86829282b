"""Parts of a run that the paper does not describe: examples, memory, processes, the model's state."""
