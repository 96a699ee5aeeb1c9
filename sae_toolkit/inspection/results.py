"""What an inspection writes of one SAE: features.parquet, and what is made from it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from sae_toolkit.inspection import effects, features_file, neuronpedia, page
from sae_toolkit.inspection.run import InspectedSAE
from sae_toolkit.model.loading import LanguageModels
from sae_toolkit.settings.inspection import InspectionSettings

_MADE_FROM_FEATURES = (page.FILENAME, page.DATA, effects.FILENAME, neuronpedia.DIRECTORY)


def write_results(each: InspectedSAE, models: LanguageModels, settings: InspectionSettings) -> Iterator[Path]:
    """Writes what the settings ask for into the SAE's directory, and yields the path of each when it is there.

    What an earlier inspection made from its features.parquet is removed with that file, since it would tell of other
    features.
    """
    run = settings.run
    model, tokenizer = models.load(each.prepared.model, each.prepared.hook_name), each.prepared.tokenizer
    path = features_file.write_features(each, model, settings.features)
    for name in _MADE_FROM_FEATURES:
        earlier = each.directory / name
        if earlier.is_dir():
            shutil.rmtree(earlier)
        else:
            earlier.unlink(missing_ok=True)
    yield path
    if not run.no_page:
        yield page.write_page(path, tokenizer)
    if run.effects:
        yield effects.write_effects(each, model, path, run.effects)
    if run.export == "neuronpedia":
        yield neuronpedia.export_neuronpedia(path, tokenizer)
