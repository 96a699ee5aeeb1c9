"""What an inspection writes of one SAE: features.parquet, and what is made from it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pyarrow import ArrowException

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE
from sae_toolkit.evaluation.stability.measure import is_same
from sae_toolkit.evaluation.stability.partners import nearest_cosines
from sae_toolkit.inspection import effects, explanations, features_file, latents, neuronpedia, page, saedashboard
from sae_toolkit.inspection.run import InspectedSAE
from sae_toolkit.model.loading import LanguageModels
from sae_toolkit.saes.weights import written_directions
from sae_toolkit.settings.inspection import InspectionSettings

log = logging.getLogger(__name__)

_MADE_FROM_FEATURES = (
    *(page.FILENAME, page.DATA, effects.FILENAME, neuronpedia.DIRECTORY, saedashboard.DIRECTORY, latents.DIRECTORY),
    explanations.FILENAME,
)


def found_again(evaluated: EvaluatedSAE, others: Sequence[EvaluatedSAE]) -> dict[str, torch.Tensor]:
    """Returns how near each feature of an SAE comes to one of other SAEs.

    Returns:
        By the name of each SAE that is not this one, the largest cosine [F] of each decoder vector to any of its own.
    """
    W_dec_FD = evaluated.sae.W_dec.detach().cpu()
    different = [other for other in others if not is_same(evaluated.file, other.file)]
    return {other.file.name: nearest_cosines(W_dec_FD, other.sae.W_dec.detach().cpu()) for other in different}


def write_results(
    each: InspectedSAE, others: Sequence[EvaluatedSAE], models: LanguageModels, settings: InspectionSettings
) -> Iterator[Path]:
    """Writes what the settings ask for into the SAE's directory, and yields the path of each when it is there.

    What an earlier inspection made from its features.parquet is kept if the file is the same again, and removed
    otherwise, since it would tell of other examples.

    Args:
        each: the SAE and what was kept of its features.
        others: SAEs that its features are looked for in.
        models: the loaded language model.
        settings: what is written.
    """
    run = settings.run
    model, tokenizer = models.load(each.prepared.model, each.prepared.hook_name), each.prepared.tokenizer
    path, explained = each.directory / features_file.FILENAME, each.directory / explanations.FILENAME
    if features_file.write_features(each, model, settings.features, found_again(each.evaluated, others)):
        _remove_what_was_made_from_features(each.directory)
    yield path
    if not run.no_page:
        if settings.features.neighbors == 0:
            log.warning("--neighbors 0: the page cannot say which features are twins")
        yield page.write_page(path, tokenizer, explained if explained.exists() else None)
    if run.effects:
        yield effects.write_effects(each, model, path, run.effects)
    if "neuronpedia" in run.export:
        yield neuronpedia.export_neuronpedia(path, tokenizer)
    if "saedashboard" in run.export:
        yield saedashboard.export_saedashboard(path, written_directions(each.evaluated.sae).cpu(), model)
    if "delphi" in run.export:
        yield latents.export_latents(each, model, settings.saes.batch_size)
    if settings.explanations.explain:
        # Imported here because delphi is not always installed, and takes seconds to import.
        from sae_toolkit.inspection.explanations.run import write_explanations

        batch_size, lm_dtype = settings.saes.batch_size, settings.saes.lm_dtype
        write_explanations(each, model, path, settings.explanations, batch_size=batch_size, lm_dtype=lm_dtype)
        if not run.no_page:
            page.write_page(path, tokenizer, explained)
        yield explained


def check_directory(directory: Path) -> None:
    """Checks that an inspection into a directory would replace nothing but what an earlier one wrote there.

    Raises:
        UserError: it would.
    """
    path = directory / features_file.FILENAME
    if path.exists():
        try:
            features_file.read_description(path)
        except (OSError, ArrowException, KeyError, TypeError, ValueError):
            raise UserError(
                f"--output {directory}: {path.name} was not written by this script, and would be replaced; name another"
                " directory"
            ) from None
        return
    if foreign := next((name for name in _MADE_FROM_FEATURES if (directory / name).exists()), None):
        raise UserError(
            f"--output {directory}: {foreign} is there without a {path.name}, and would be replaced; name another"
            " directory"
        )


def _remove_what_was_made_from_features(directory: Path) -> None:
    for name in _MADE_FROM_FEATURES:
        earlier = directory / name
        if not earlier.exists():
            continue
        log.info("%s is removed: it was made from other examples", earlier)
        if earlier.is_dir():
            shutil.rmtree(earlier)
        else:
            earlier.unlink()
