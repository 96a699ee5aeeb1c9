"""The demo cut to 16 steps, and the names under which a run is recorded."""

import re

from sae_toolkit import ROOT

SHORT_DEMO = (
    *("@presets/demo.args", "--training_tokens", 16 * 1024, "--train_batch_size_tokens", 1024),
    *("--lr_warm_up_steps", 4, "--lr_decay_steps", 4),
)
PANELS = re.findall(r"`((?:learning|sparsity|alive|speed|held_out)/\w+)`", (ROOT / "docs" / "training.md").read_text())
