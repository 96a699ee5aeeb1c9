"""Whether an SAE may have been trained on a text follows from its record: yes, no, or not known."""

from pathlib import Path

import pytest

from sae_toolkit.evaluation.seen_text import may_have_trained_on
from sae_toolkit.text.sources import HeldOutSplit, TextSource

OWN = {
    **{"dataset_path": "owner/text", "dataset_config": "small", "dataset_split": "train", "text_column": "text"},
    **{"held_out_fraction": 0.1, "held_out_seed": 42},
}
SPLIT = HeldOutSplit(0.1, 42)


def source(name="owner/text", config="small", split="train", column="text"):
    return TextSource(name, config, split, column, tokenized=False, read=lambda: ())


@pytest.mark.parametrize(
    ("record", "text", "held_out", "seen"),
    [
        (OWN, {}, SPLIT, False),
        (OWN, {}, HeldOutSplit(0.05, 42), False),
        (OWN, {}, HeldOutSplit(0.2, 42), True),
        (OWN, {}, HeldOutSplit(0.1, 7), True),
        (OWN, {}, None, True),
        (OWN, {"column": "other"}, SPLIT, True),
        (OWN, {"split": "test"}, None, False),
        (OWN, {"split": "train[:5%]"}, None, None),
        (OWN, {"config": "large"}, None, None),
        (OWN, {"name": "owner/other"}, None, False),
        (OWN | {"dataset_split": None}, {}, None, True),
        (OWN | {"held_out_fraction": "0.1"}, {}, SPLIT, True),
        (OWN | {"initialized_from": OWN | {"dataset_split": 3}}, {}, SPLIT, True),
        ({}, {}, SPLIT, None),
        (OWN | {"initialized_from": OWN}, {}, SPLIT, False),
        (OWN | {"initialized_from": OWN | {"held_out_seed": 7}}, {}, SPLIT, True),
        (OWN | {"initialized_from": {}}, {}, SPLIT, None),
        (OWN | {"initialized_from": OWN | {"initialized_from": OWN | {"held_out_seed": 7}}}, {}, SPLIT, True),
    ],
)
def test_it_follows_from_the_data_set_and_what_is_held_out_of_it(record, text, held_out, seen):
    assert may_have_trained_on(record, source(**text), held_out) is seen


def test_a_file_of_the_directory_that_was_trained_on_may_have_been(tmp_path):
    file = tmp_path / "data" / "a.jsonl"
    file.parent.mkdir()
    file.touch()
    (tmp_path / "other").mkdir()
    for trained_on, name, seen in (
        (file.parent, file, True),
        (file, file.parent, True),
        (tmp_path / "other", file, False),
    ):
        assert may_have_trained_on(OWN | {"dataset_path": str(trained_on)}, source(name=str(Path(name))), None) is seen
