"""The ranks that train one SAE together: how torchrun starts them and how they exchange tensors."""
