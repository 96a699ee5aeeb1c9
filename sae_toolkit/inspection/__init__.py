"""Every feature of an SAE: how often and how strongly it fires, on what text, and what it makes likelier."""
