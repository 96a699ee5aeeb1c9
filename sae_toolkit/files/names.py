"""Names of the files that a training run leaves in its directory."""

FLAGS_FILENAME = "training_flags.json"
METRICS_FILENAME = "metrics.jsonl"
HELD_OUT_METRICS_FILENAME = "held_out.jsonl"
