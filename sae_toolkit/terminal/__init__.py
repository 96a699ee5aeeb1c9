"""What the scripts show on the terminal, and the signals that stop them."""
