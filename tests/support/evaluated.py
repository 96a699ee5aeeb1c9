"""SAEs of random weights on a tiny model, and what an evaluation says of them."""

import json
from pathlib import Path

import torch
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

CONTEXT, N_ROWS, BATCH = 48, 20, 4
BOS, EOS = 1, 2


def save_sae(path, *, hook="blocks.2.hook_resid_post", seed=0, k=None, **metadata):
    torch.manual_seed(seed)
    shape = {"d_in": 32, "d_sae": 96, "apply_b_dec_to_input": True}
    sae = StandardSAE(StandardSAEConfig(**shape)) if k is None else TopKSAE(TopKSAEConfig(**shape, k=k))
    for name, parameter in sae.named_parameters():
        parameter.data = torch.randn_like(parameter) * (0.05 if name.startswith("b_") else 0.2)
    for name, value in ({"hook_name": hook} | metadata).items():
        setattr(sae.cfg.metadata, name, value)
    sae.save_model(path)
    return path


def result_of(sae_path):
    return json.loads((Path(sae_path) / "evaluation.json").read_text())
