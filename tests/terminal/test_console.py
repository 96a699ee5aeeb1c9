"""A script ends with one status and one message, also if a signal comes while it ends."""

import signal

import pytest

from sae_toolkit.errors import RunFailed, UserError
from sae_toolkit.terminal.console import run_script
from sae_toolkit.terminal.stop_signals import hear_stop_signals


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (UserError("--k 0: must be 1 or more"), 2, "error: --k 0: must be 1 or more\n"),
        (RunFailed("rank 0: another rank is gone"), 1, "error: rank 0: another rank is gone\n"),
        (KeyboardInterrupt(), 130, ""),
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
