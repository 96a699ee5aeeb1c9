"""What a run says at its end of the L0 that it reached."""

import pytest


@pytest.mark.parametrize("architecture", ["batchtopk", "topk"])
def test_an_l0_below_k_is_warned_of(script, tiny_args, tmp_path, architecture):
    """Of 256 features about half have a positive pre-activation on a token, so that no more can be active."""
    flags = ("--architecture", architecture, "--checkpoint_path", tmp_path / architecture)
    for k, is_warned_of in ((250, True), (8, False)):
        done = script("sae_lens_train.py", f"@{tiny_args}", "--k", k, *flags)
        assert done.status == 0, done.stderr
        assert (f"warning --k {k}: the SAE ended with an L0 of 1" in done.stderr) == is_warned_of, done.stderr
