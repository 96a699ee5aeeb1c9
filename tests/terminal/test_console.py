"""A script ends with one status and one message, also if a signal comes while it ends."""

import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from sae_toolkit.errors import RunFailed, UserError
from sae_toolkit.terminal.console import run_script
from sae_toolkit.terminal.stop_signals import hear_stop_signals


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (UserError("--k 0: must be 1 or more"), 2, "error: --k 0: must be 1 or more\n"),
        (RunFailed("rank 0: another rank is gone"), 1, "error: rank 0: another rank is gone\n"),
        (KeyboardInterrupt(), 130, "stopped (Ctrl-C)\n"),
        (None, 128 + signal.SIGTERM, ""),
    ],
)
def test_a_signal_that_comes_while_a_script_ends_hides_nothing(capfd, error, status, shown):
    def main():
        with hear_stop_signals():
            try:
                if error:
                    raise error
            finally:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert (ended.value.code, capfd.readouterr().err) == (status, shown)


def test_a_full_disk_is_no_bug(capfd, disk_of):
    disk = disk_of("64k")

    def with_python():
        (disk / "text").write_text("x" * 200_000)

    def with_torch():
        torch.save(torch.zeros(100_000), disk / "tensor")

    def with_safetensors():
        save_file({"a": torch.zeros(100_000)}, disk / "tensors")

    def with_arrow():
        pq.write_table(pa.table({"a": np.random.default_rng(0).random(100_000)}), disk / "table")

    for write in (with_python, with_torch, with_safetensors, with_arrow):
        with pytest.raises(SystemExit) as ended:
            run_script(write)
        shown = capfd.readouterr().err
        assert (ended.value.code, shown.count("\n")) == (2, 1), shown
        assert shown.startswith("error: a file cannot be written: "), shown
        for left in disk.iterdir():
            left.unlink()
