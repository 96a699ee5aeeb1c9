"""Probes an SAE with sae-probes itself, in an environment of its own (requirements/sae-probes.txt).

It imports nothing of this project:
    python tests/support/probe_with_sae_probes.py texts DATA_SET OUT.csv
    python tests/support/probe_with_sae_probes.py probe DATA_SET SAE_DIR HOOK CACHE OUT_DIR K...

The first writes a data set of sae-probes with its columns prompt and target. The second reads the activations of all
its texts from CACHE/model_activations_model/DATA_SET_HOOK.pt, where sae-probes looks for them, and writes below OUT_DIR
what sae-probes finds: the JSON files of the probes on the SAE and of the baseline.
"""

import sys

from sae_lens import SAE
from sae_probes import run_sae_evals
from sae_probes.run_baselines import run_baseline_dataset_layer
from sae_probes.utils_data import read_numbered_dataset_df


def main(command: str, dataset: str, *more: str) -> None:
    if command == "texts":
        (out,) = more
        read_numbered_dataset_df(dataset)[["prompt", "target"]].to_csv(out, index=False)
        return
    sae_dir, hook_name, cache, out, *ks = more
    where = {"model_name": "model", "hook_name": hook_name, "model_cache_path": cache, "results_path": out}
    run_sae_evals(
        SAE.load_from_disk(sae_dir, device="cpu"),
        reg_type="l1",
        setting="normal",
        ks=[int(k) for k in ks],
        datasets=[dataset],
        device="cpu",
        **where,
    )
    run_baseline_dataset_layer(numbered_dataset=dataset, method_name="logreg", **where)


if __name__ == "__main__":
    main(*sys.argv[1:])
