"""The record of a training run, in wandb or TensorBoard."""
