"""Where a training run is recorded: wandb or TensorBoard."""
