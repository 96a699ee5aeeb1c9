#!/usr/bin/env bash
# Trains one SAE on chosen GPUs: ./run_simple.sh NUM_GPUS "GPU_IDS" [flags of sae_lens_train.py]
#
#   ./run_simple.sh 1 "0" --model_name "meta-llama/Meta-Llama-3-8B" --layer 12 --expansion_factor 32
#   ./run_simple.sh 4 "0,1,2,3" @presets/llama3-8b.args --store_batch_size_prompts 32
#   ./run_simple.sh 2 cpu @presets/demo.args                 two ranks on the CPU
#
# On several machines: run the same command on each, with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set. NUM_GPUS
# is per machine. With MAX_RESTARTS=3 a run resumes from its last checkpoint if a rank dies. See docs/scaling.md.
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=setup_environment.sh
source ./setup_environment.sh

fail() {
    echo "error: $1" >&2
    exit 2
}

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit
fi
if [[ $# -lt 2 || "$1" == -* ]]; then
    fail 'usage: ./run_simple.sh NUM_GPUS "GPU_IDS" [flags of sae_lens_train.py], such as: ./run_simple.sh 1 "0" --layer 12'
fi
num_gpus=$1 gpu_ids=$2
shift 2
[[ "$num_gpus" =~ ^[1-9][0-9]*$ ]] || fail "NUM_GPUS $num_gpus: must be a whole number of 1 or more"
if [[ "$gpu_ids" == cpu ]]; then
    gpu_ids=""
else
    [[ "$gpu_ids" =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "GPU_IDS $gpu_ids: must be numbers joined by commas, such as \"0\" or \"0,1\", or cpu"
    IFS=, read -ra ids <<<"$gpu_ids"
    [[ ${#ids[@]} -eq $num_gpus ]] || fail "GPU_IDS $gpu_ids: ${#ids[@]} ids, and NUM_GPUS is $num_gpus; make them equal"
    [[ $(printf '%s\n' "${ids[@]}" | sort -u | wc -l) -eq $num_gpus ]] || fail "GPU_IDS $gpu_ids: an id appears twice; name each GPU once"
fi

set_up_environment requirements.txt requirements/embedded.txt
if [[ -n "$gpu_ids" ]]; then
    gpus=$(cuda_devices)
    n_gpus=$(grep -c . <<<"$gpus" || true)
    for id in "${ids[@]}"; do
        [[ $id -lt $n_gpus ]] || fail "GPU_IDS $gpu_ids: torch sees $n_gpus GPUs on this machine; to run on the CPU: ./run_simple.sh $num_gpus cpu"
    done
fi
export CUDA_VISIBLE_DEVICES=$gpu_ids
if [[ $num_gpus -eq 1 && "${NNODES:-1}" == 1 ]]; then
    exec "$PYTHON" sae_lens_train.py "$@"
fi
exec "$PYTHON" -m sae_toolkit.distributed.launch "$num_gpus" "$@"
