"""What the tests of inspect_sae_features.py share."""

from pathlib import Path

import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_toolkit.files.embedded import EMBEDDED_MODEL

CONTEXT = 64
FLAGS = ("--tokens", "8000", "--lm_dtype", "float32", "--device", "cpu", "--examples", "4", "--drawn_examples", "3")


def save_sae(directory: Path, hook_name: str, W_dec_FD: torch.Tensor, threshold: float, **metadata: object) -> Path:
    """Saves an SAE of the embedded model that reads and writes these directions, above a threshold."""
    n_features, d_in = W_dec_FD.shape
    record = SAEMetadata(model_name=EMBEDDED_MODEL, hook_name=hook_name, prepend_bos=True, **metadata)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=n_features, apply_b_dec_to_input=False, metadata=record))
    sae.load_state_dict(
        {
            "W_dec": W_dec_FD,
            "W_enc": W_dec_FD.T.contiguous(),
            "b_enc": torch.zeros(n_features),
            "b_dec": torch.zeros(d_in),
            "threshold": torch.full((n_features,), threshold),
        }
    )
    sae.save_model(directory)
    return directory
