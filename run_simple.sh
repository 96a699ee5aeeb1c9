#!/usr/bin/env bash
# Trains on chosen GPUs: ./run_simple.sh NUM_GPUS "GPU_IDS" [flags of sae_lens_train.py]
#
#   ./run_simple.sh 1 "0" --model_name "meta-llama/Meta-Llama-3-8B" --layer 12 --expansion_factor 32
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=setup_environment.sh
source ./setup_environment.sh

fail() {
    echo "error: $1" >&2
    exit 2
}

if [[ $# -lt 2 || "$1" == -* ]]; then
    fail 'usage: ./run_simple.sh NUM_GPUS "GPU_IDS" [flags of sae_lens_train.py], such as: ./run_simple.sh 1 "0" --layer 12'
fi
num_gpus=$1 gpu_ids=$2
shift 2
[[ "$num_gpus" =~ ^[1-9][0-9]*$ ]] || fail "NUM_GPUS $num_gpus: must be a whole number of 1 or more"
[[ "$gpu_ids" =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "GPU_IDS $gpu_ids: must be numbers joined by commas, such as \"0\" or \"0,1\""
IFS=, read -ra ids <<<"$gpu_ids"
[[ ${#ids[@]} -eq $num_gpus ]] || fail "GPU_IDS $gpu_ids: ${#ids[@]} ids, and NUM_GPUS is $num_gpus"
[[ $(printf '%s\n' "${ids[@]}" | sort -u | wc -l) -eq $num_gpus ]] || fail "GPU_IDS $gpu_ids: an id stands there twice"
[[ $num_gpus -eq 1 ]] || fail "NUM_GPUS $num_gpus: training on several GPUs is not there yet; use 1"

set_up_environment requirements.txt requirements-embedded.txt
gpus=$(cuda_devices)
n_gpus=$(grep -c . <<<"$gpus" || true)
for id in "${ids[@]}"; do
    [[ $id -lt $n_gpus ]] || fail "GPU_IDS $gpu_ids: torch sees $n_gpus GPUs on this machine; without one: ./run_saelens_training.sh demo"
done
CUDA_VISIBLE_DEVICES=$gpu_ids exec "$PYTHON" sae_lens_train.py "$@"
