"""What the training and evaluation scripts share, in the order data flows.

text -> token_rows -> language_model -> activations -> training -> checkpoints -> evaluation -> health -> report
"""
