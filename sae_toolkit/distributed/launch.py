"""Starts the ranks of sae_lens_train.py under torchrun, on one machine or several, and reports failures in one line.

python -m sae_toolkit.distributed.launch NUM_PROCESSES [flags of sae_lens_train.py]
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
from typing import Any

from sae_toolkit import ROOT
from sae_toolkit.distributed.torchrun import RANK_IS_GONE
from sae_toolkit.errors import RunFailed, UserError, one_line
from sae_toolkit.settings.checks import check_world_size
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.terminal.console import run_script
from sae_toolkit.terminal.redaction import redact
from sae_toolkit.terminal.stop_signals import TERMINATIONS

_SCRIPT = ROOT / "sae_lens_train.py"


def main() -> int:
    if len(sys.argv) < 2:
        raise UserError("usage: python -m sae_toolkit.distributed.launch NUM_PROCESSES [flags of sae_lens_train.py]")
    n_processes, flags = _whole_number(sys.argv[1], "NUM_GPUS", 1), sys.argv[2:]
    n_machines = _variable("NNODES", 1, 1)
    settings = parse_training_flags(flags)  # so a mistake is reported once, before any rank starts
    check_world_size(settings, n_processes * n_machines)
    n_threads = max(1, len(os.sched_getaffinity(0)) // n_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(n_threads))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # `_explain` reports errors in one line
    # Without this, restarted ranks would try to reach the ranks that they replace: their addresses are still in the
    # shared store.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    passed_on = ",".join(number.name for number in (signal.SIGINT, signal.SIGQUIT, *TERMINATIONS))
    with tempfile.TemporaryDirectory(prefix="torchrun-") as logs:
        return _torchrun(
            f"--nproc-per-node={n_processes}",
            f"--nnodes={n_machines}",
            f"--max-restarts={_variable('MAX_RESTARTS', 0, 0)}",
            *(["--standalone"] if n_machines == 1 else _meeting_place(n_machines)),
            f"--log-dir={logs}",
            f"--signals-to-handle={passed_on}",  # on to the ranks, which then save a checkpoint
            "--local-ranks-filter=0",  # the other ranks of this machine log the same
            "--monitor-interval=0.5",
            f"--shutdown-timeout={_variable('SHUTDOWN_TIMEOUT', 300, 1)}",  # seconds to write a checkpoint
            str(_SCRIPT),
            *flags,
        )


def _whole_number(text: str, name: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise UserError(f"{name} {text}: must be a whole number of {least} or more")
    return int(text)


def _variable(name: str, default: int, least: int) -> int:
    return _whole_number(os.environ.get(name) or str(default), name, least)


def _meeting_place(n_machines: int) -> list[str]:
    """Returns the torchrun flags by which machines find one another, from NODE_RANK, MASTER_ADDR and MASTER_PORT."""
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(
                f"NNODES {n_machines}: {name} is not set; every machine needs NNODES, NODE_RANK (0 to"
                f" {n_machines - 1}), MASTER_ADDR and MASTER_PORT (of machine 0, the same on all)"
            )
    node_rank = _whole_number(os.environ["NODE_RANK"], "NODE_RANK", 0)
    if node_rank >= n_machines:
        raise UserError(f"NODE_RANK {node_rank}: there are {n_machines} machines (NNODES), 0 to {n_machines - 1}")
    address = os.environ["MASTER_ADDR"]
    port = _whole_number(os.environ["MASTER_PORT"], "MASTER_PORT", 1)
    here = _address_towards(address, port)
    if interface := _interface_of(here):  # the default is that of the host name, which may be loopback
        for backend in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{backend}_SOCKET_IFNAME", interface)
    timeout = _variable("JOIN_TIMEOUT", 600, 1)  # seconds
    return [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={address}:{port}",
        f"--rdzv-id={port}",
        f"--rdzv-conf=is_host={int(node_rank == 0)},join_timeout={timeout},read_timeout={timeout}",
        f"--local-addr={here}",
    ]


def _address_towards(address: str, port: int) -> str:
    """Returns the address that this machine uses to reach another one."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, port))  # sends nothing
            return probe.getsockname()[0]
    except (OSError, OverflowError) as error:
        raise UserError(f"MASTER_ADDR {address}, MASTER_PORT {port}: cannot be reached: {error}") from None


def _interface_of(address: str) -> str | None:
    import psutil

    return next(
        (name for name, found in psutil.net_if_addrs().items() if any(each.address == address for each in found)), None
    )


def _torchrun(*arguments: str) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # `_explain` reports errors in one line
    try:
        run(parse_args(arguments))
    except ChildFailedError as error:
        return _explain(error)
    except SignalException as stopped:  # the ranks got the signal too
        return 128 + stopped.sigval
    except RendezvousError as error:
        raise RunFailed(
            f"MASTER_ADDR {os.environ.get('MASTER_ADDR')}: the machines did not meet there ({one_line(error)}); start"
            " the same command on every machine, each with its own NODE_RANK"
        ) from None
    return 0


def _explain(error: Any) -> int:
    """Prints which rank failed first and why, unless that rank has printed it. Returns the exit status of that rank.

    Raises:
        RunFailed: a signal killed that rank.
    """

    def how_telling(failure: Any) -> tuple[bool, bool, bool, int]:
        ended_by_torchrun = failure.exitcode == -signal.SIGTERM
        return ended_by_torchrun, failure.exitcode >= 0, RANK_IS_GONE in failure.message, failure.timestamp

    rank, failure = min(error.failures.items(), key=lambda item: how_telling(item[1]))
    if failure.exitcode < 0:
        raise RunFailed(
            f"rank {rank} was killed by {failure.signal_name()}; repeat the command with --resume to continue, or set"
            " MAX_RESTARTS=3 to let torchrun do that"
        )
    if failure.local_rank != 0 and failure.exitcode < 128:  # local rank 0 has printed its error itself
        details = failure.error_file_data.get("message", {})
        stack = details.get("extraInfo", {}).get("py_callstack") if isinstance(details, dict) else None
        is_bug = failure.exitcode == 1 and not failure.message.startswith(RunFailed.__name__)
        print(redact(f"error: rank {rank}: {stack if is_bug and stack else failure.message}"), file=sys.stderr)
    return failure.exitcode


if __name__ == "__main__":
    run_script(main)
