"""Trains SAEs of several architectures on batches from a file, in two processes, each on its own part of each batch;
rank 0 saves what came out. Those that can be are trained again with their features spread over the processes.

    python step_in_ranks.py ACTIVATIONS RESULT
"""

import os
import socket
import sys

import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TrainingSAE
from sae_lens.registry import get_sae_training_class

from sae_toolkit.distributed.ranks import join_ranks
from sae_toolkit.steps.sharded_sae import ShardedTrainer, shard_sae
from sae_toolkit.steps.sparse_topk import sparse_class
from sae_toolkit.steps.trainer import Trainer

BATCH, N_STEPS = 128, 21
SETTINGS = {
    "topk": {"k": 16},
    "batchtopk": {"k": 16},
    "matryoshka_batchtopk": {"k": 16, "matryoshka_widths": [64, 256, 576]},
    "jumprelu": {"l0_coefficient": 1.0},
    "standard": {"l1_coefficient": 1.0},
    "gated": {"l1_coefficient": 1.0},
}


SHARDED = ", sharded"
NAMES = [*SETTINGS, "topk" + SHARDED, "batchtopk" + SHARDED]


def train(name, acts_ND, ranks):
    """The losses that each tenth step shows, and the SAE."""
    architecture = name.removesuffix(SHARDED)
    sae_class, config_class = get_sae_training_class(architecture)
    cfg = LanguageModelSAERunnerConfig(
        sae=config_class(d_in=acts_ND.shape[1], d_sae=576, dtype="float64", **SETTINGS[architecture]),
        training_tokens=1000 * BATCH,
        train_batch_size_tokens=BATCH,
        lr=4e-4,
        lr_warm_up_steps=10,
        dead_feature_window=6,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    torch.manual_seed(ranks.rank)  # a rank that begins elsewhere is given the weights of rank 0
    sae = sparse_class(sae_class, cfg.sae)(TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict()).cfg)
    if name != architecture and not ranks.is_alone:
        sae = shard_sae(sae if ranks.is_main else None, "cpu", ranks)
        trainer = ShardedTrainer(cfg.to_sae_trainer_config(), sae, iter(()), ranks)
    else:
        trainer = Trainer(cfg.to_sae_trainer_config(), sae, iter(()), ranks)
    readings = []
    generator = torch.Generator().manual_seed(0)
    for step in range(N_STEPS):
        batch = acts_ND[torch.randint(len(acts_ND), (BATCH,), generator=generator)]
        # Parts of unequal length, as the shuffling buffer makes them.
        cuts = [0, BATCH // 2 - step % 7, BATCH] if ranks.size == 2 else [0, BATCH]
        output = trainer.step(batch[cuts[ranks.rank] : cuts[ranks.rank + 1]])
        if step % 10 == 0:
            readings.append(trainer.build_train_step_log_dict(output, trainer.n_training_samples))
        trainer.n_training_steps += 1
    trainer = trainer.whole(finished=False)
    if trainer is None:
        return None
    state = {name: tensor.detach() for name, tensor in trainer.sae.state_dict().items()}
    counts = {"since": trainer.n_forward_passes_since_fired, "scores": trainer.act_freq_scores}
    calibration = None
    if trainer.calibration is not None:
        (threshold,) = trainer.calibration.tensors.values()
        sample_ND = trainer.sample.acts_ND.double()
        calibration = [float(threshold), trainer.calibration.l0, len(sample_ND), float(sample_ND.square().sum())]
    n = trainer.n_training_samples
    return {"readings": readings, "sae": state, "counts": counts, "n": n, "calibration": calibration}


def become_two_ranks():
    """Forks. The two processes have the environment that torchrun would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rank = 0 if os.fork() else 1
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in ours.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none"}


def main():
    become_two_ranks()
    acts_ND = torch.load(sys.argv[1]).double()
    with join_ranks() as ranks:
        results = {name: train(name, acts_ND, ranks) for name in NAMES}
        if ranks.is_main:
            torch.save(results, sys.argv[2])


if __name__ == "__main__":
    main()
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]) if os.environ["RANK"] == "0" else 0)
