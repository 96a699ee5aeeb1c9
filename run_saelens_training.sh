#!/usr/bin/env bash
# Trains a sparse autoencoder (SAE), evaluates it on real activations, and prints whether it is healthy.
#
#   ./run_saelens_training.sh                      on a GPU the preset llama3-8b as far as it fits, otherwise demo
#   ./run_saelens_training.sh demo                 a preset of your choice: one of presets/*.args
#   ./run_saelens_training.sh demo --k 32 --seed 1 a preset, changed by flags of sae_lens_train.py
#   ./run_saelens_training.sh --like RUN --lr 1e-3 the flags of an earlier run, changed by those given
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=setup_environment.sh
source ./setup_environment.sh

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0"
    exit
fi
preset=""
if [[ $# -gt 0 && "$1" != -* && "$1" != @* ]]; then
    preset=$1
    shift
    if [[ ! -f "presets/$preset.args" ]]; then
        echo "error: no preset $preset; the presets are $(basename -s .args presets/*.args | paste -sd' ')" >&2
        exit 2
    fi
fi

set_up_environment requirements.txt requirements/embedded.txt
gpus=$(cuda_devices)
flags=("$@")
rows_at_once=() # in the evaluation
if [[ " $*" == *" --like"* ]]; then
    echo "The flags of an earlier run (--like), on ${gpus:-the CPU}"
elif [[ -n "$preset" ]]; then
    echo "Preset $preset, on ${gpus:-the CPU}"
elif [[ -n "$gpus" ]]; then
    choice=$("$PYTHON" -m sae_toolkit.training.card "$@")
    mapfile -t choice <<<"$choice" # a line that says what and why, the evaluation's batch size, words of flags
    echo "${choice[0]}"
    rows_at_once=(--batch_size "${choice[1]}")
    flags=("${choice[@]:2}" "$@")
else
    preset=demo
    echo "Preset $preset, the embedded model and text: torch sees no CUDA device"
fi
if [[ -n "$preset" ]]; then
    flags=("@presets/$preset.args" "$@")
fi

# Stage 1: train. The training prints one line on standard output: the directory of the finished SAE.
# SIGTERM and the like may reach this script alone, so it passes them on; the training then saves a checkpoint and says
# how to resume. Ctrl-C reaches the training directly.
output=$(mktemp)
trap 'rm -f "$output"' EXIT
"$PYTHON" sae_lens_train.py "${flags[@]}" >"$output" <&0 &
training=$!
terminations=(TERM HUP USR1 USR2 XCPU)
for name in "${terminations[@]}"; do
    # shellcheck disable=SC2064  # $name is that of this signal
    trap "kill -$name $training 2>/dev/null || true" "$name"
done
trap : INT
status=0
while kill -0 "$training" 2>/dev/null; do
    status=0
    wait "$training" || status=$?
done
trap - "${terminations[@]}" INT
sae_path=$(<"$output")
if [[ $status -ne 0 || -z "$sae_path" ]]; then # failed, stopped, or --dry_run
    exit "$status"
fi

# Stage 2: evaluate on the text that was held out of the training, on the same device.
device=auto
while [[ $# -gt 0 ]]; do
    case $1 in
    --device) device=$2 ;;
    --device=*) device=${1#*=} ;;
    esac
    shift
done
"$PYTHON" evaluate_sae_real_activations.py --sae_path "$sae_path" --device "$device" \
    ${rows_at_once[@]+"${rows_at_once[@]}"}
