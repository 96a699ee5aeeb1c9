"""Publishes evaluated SAEs on the Hugging Face Hub, in SAELens's layout, with the measurements on a model card."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from sae_lens import SAE
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface
from safetensors import safe_open

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.files.connection import ConnectionFailed, retrying
from sae_toolkit.files.names import FLAGS_FILENAME
from sae_toolkit.reports.results import Result
from sae_toolkit.reports.tables import (
    documents,
    first_position_note,
    health_table,
    markdown_table,
    place,
    positions,
    shape,
    verdict,
)
from sae_toolkit.settings.command_line import flags_with, training_words
from sae_toolkit.settings.fields import Scope
from sae_toolkit.terminal.redaction import redact
from sae_toolkit.training.directory import find_run_directory

log = logging.getLogger(__name__)

_CARD_MARK = "Measured with SAELensTrain"
# Flags that the recipe leaves out: they describe this machine, or do not affect the SAE.
_NOT_RECIPE = flags_with(Scope.RUN, Scope.PROCESS, Scope.COMMAND) - {"shard_features"} | {"fallback_dataset"}
_DEFINITIONS = """\
- **Loss recovered**: (CE with zeros at the hook - CE with the SAE) / (CE with zeros - CE of the model alone); CE is the
  mean next-token cross-entropy. SAEBench's `ce_loss_score`.
- **L0**: mean number of features active on a token.
- **Dead features**: share of features without one activation on the evaluated tokens.
- **Decoder absorption**: mean over features of the largest cosine similarity of their decoder vector to another one.

The SAE replaces activations, and is scored, only at the positions that are named for it above."""


def check_may_publish(repository: str) -> None:
    """Checks with the Hub that the person who is logged in may write to a repository, before anything is measured.

    Args:
        repository: owner/name.

    Raises:
        UserError: the person may not, or the Hub cannot be reached.
    """
    with _refusals(repository):
        validate_repo_id(repository)
        if "/" not in repository:
            raise UserError(f"--push_to_hub {repository}: must be owner/name, such as your user name and a new name")
        me = retrying(f"--push_to_hub {repository}", lambda: HfApi().whoami())
    owner = repository.partition("/")[0]
    mine = {me["name"], *(organization["name"] for organization in me.get("orgs", []))}
    if owner.lower() not in {name.lower() for name in mine}:
        raise UserError(
            f"--push_to_hub {repository}: {me['name']} is logged in, and does not belong to {owner}; use"
            f" {me['name']}/{repository.partition('/')[2]}, or log in as somebody else (`hf auth login`)"
        )
    role = me.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(
            f"--push_to_hub {repository}: the token may only read; make one that may write, and log in with it"
            " (`hf auth login`)"
        )


@contextmanager
def _refusals(repository: str) -> Iterator[None]:
    """Turns errors of the Hub into UserErrors with a message of one line."""
    where = f"--push_to_hub {repository}"
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{where}: is not the name of a repository (owner/name): {one_line(error)}") from None
    except LocalTokenNotFoundError:
        raise UserError(
            f"{where}: nobody is logged in; run `hf auth login`, or set HF_TOKEN to a token that may write"
        ) from None
    except OfflineModeIsEnabled:
        raise UserError(f"{where}: HF_HUB_OFFLINE is set; unset it to publish") from None
    except ConnectionFailed as error:
        raise UserError(f"{where}: the Hugging Face Hub cannot be reached ({error.reason})") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        what = {
            401: "refuses the token; log in again (`hf auth login`, or HF_TOKEN)",
            403: "does not let this token write there; make one that may, or name another repository",
            404: "has no such repository, and does not let this token make one; make it there, or name another",
            413: "has no room for files of this size; ask it for more, or publish fewer SAEs",
        }.get(status, f"refuses it: {one_line(error)}")
        raise UserError(f"{where}: the Hugging Face Hub {what}") from None
    except httpx2.HTTPError as error:
        raise UserError(f"{where}: the Hugging Face Hub cannot be reached ({one_line(error)})") from None


def publish(repository: str, results: Sequence[Result]) -> str:
    """Uploads SAEs with their evaluations and a model card, and returns the address of the repository's page.

    Each SAE goes to a directory with the name of its hook, from which `SAE.from_pretrained(repository, hook)` loads
    it. The card is the repository's README.md. If the repository has a README.md that this project did not write, that
    file is kept, and the card goes to the directory of the SAE.

    Args:
        repository: owner/name.
        results: evaluations of the SAEs.

    Raises:
        UserError: the Hub refuses the upload, or cannot be reached.
    """
    names = _ids([(result.group.hook_name, result.evaluated) for result in results])
    ids = dict(zip(names, results, strict=True))
    api, where = HfApi(), f"--push_to_hub {repository}"
    with _refusals(repository):
        for sae_id, result in ids.items():
            sae: SAE[Any] | Path = result.evaluated.file.path
            if not _is_as_measured(result.evaluated):
                sae = result.evaluated.sae  # SAELens saves it in its own form
            retrying(
                where,
                lambda sae=sae, sae_id=sae_id: upload_saes_to_huggingface(  # type: ignore[misc]
                    {sae_id: sae}, repository, show_progress=False, add_default_readme=False
                ),
            )
            log.info("uploaded %s to %s", sae_id, repository)
        card = model_card(repository, ids)
        texts = {f"{sae_id}/evaluation.json": json.dumps(r.summary, indent=2) + "\n" for sae_id, r in ids.items()}
        texts |= dict.fromkeys(_card_paths(api, repository, ids), card)
        for path, text in texts.items():
            retrying(
                where,
                lambda path=path, text=text: api.upload_file(  # type: ignore[misc]
                    path_or_fileobj=redact(text).encode(),
                    path_in_repo=path,
                    repo_id=repository,
                    commit_message=f"Add {path}",
                ),
            )
    return f"{api.endpoint}/{repository}"


def check_publishable(groups: Sequence[PreparedEvaluation]) -> None:
    """Checks that SAEs can be published, before anything is measured.

    Raises:
        UserError: SAELens has no such architecture, or two SAEs would have the same name.
    """
    for group in groups:
        for evaluated in group.saes:
            if (architecture := evaluated.sae.cfg.architecture()) not in SAE_CLASS_REGISTRY:
                raise UserError(
                    f"--push_to_hub: {evaluated.file.name} is of the architecture {architecture}, which SAELens could"
                    " not load from the Hub; leave it out"
                )
    _ids([(group.hook_name, evaluated) for group in groups for evaluated in group.saes])


def _ids(saes: Sequence[tuple[str, EvaluatedSAE]]) -> list[str]:
    """Returns the id of each SAE in the repository: its hook, and the checkpoint if SAEs share it.

    Args:
        saes: the SAEs, each with the hook that it is measured at, which counts where its record names none.
    """
    hooks = [evaluated.sae.cfg.metadata.hook_name or hook for hook, evaluated in saes]
    ids = [
        hook if hooks.count(hook) == 1 else f"{hook}/{evaluated.file.path.name}"
        for hook, (_, evaluated) in zip(hooks, saes, strict=True)
    ]
    for name in ids:
        if ids.count(name) > 1:
            raise UserError(f"--push_to_hub: two SAEs would be published as {name}; evaluate only one of them")
    return ids


def _is_as_measured(evaluated: EvaluatedSAE) -> bool:
    """Whether SAELens's files of an SAE hold the tensors that were measured.

    Those of another library do not, nor unfinished ones, nor ones of SAELens before 6.0 that were folded when loaded.
    """
    weights = evaluated.file.path / SAE_WEIGHTS_FILENAME
    if evaluated.file.form.partition(",")[0] != "inference form" or not weights.is_file():
        return False
    with safe_open(weights, framework="pt") as tensors:
        return set(tensors.keys()) == set(evaluated.sae.state_dict())


def _card_paths(api: HfApi, repository: str, ids: Mapping[str, Result]) -> list[str]:
    """Returns the paths of the card: README.md, or one beside each SAE if somebody else wrote README.md."""
    if not api.file_exists(repository, "README.md") or _CARD_MARK in Path(
        api.hf_hub_download(repository, "README.md")
    ).read_text(encoding="utf-8"):
        return ["README.md"]
    log.info("%s keeps its README.md, which this project did not write; the card goes beside the SAE", repository)
    return [f"{sae_id}/README.md" for sae_id in ids]


def model_card(repository: str, ids: Mapping[str, Result]) -> str:
    """Returns the card in Markdown, with the Hub's metadata.

    Args:
        repository: owner/name.
        ids: evaluations of the SAEs, by their id in the repository.
    """
    models, datasets = _of_trainings(ids, "model_name"), _of_trainings(ids, "dataset_path")
    hub_models, hub_datasets = list(filter(_is_hub_id, models)), list(filter(_is_hub_id, datasets))
    measured = sorted({result.summary["model"] for result in ids.values()})
    data = ModelCardData(
        library_name="saelens",
        tags=["sparse-autoencoder", "mechanistic-interpretability", "saelens"],
        base_model=hub_models[0] if len(hub_models) == 1 else hub_models or None,
        datasets=hub_datasets or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repository.partition('/')[2]}",
        f"Sparse autoencoders of {' and '.join(models or measured)}, for [SAELens](https://github.com/decoderesearch/SAELens).",
        *(part for sae_id, result in ids.items() for part in _section(repository, sae_id, result)),
        f"## Definitions\n\n{_DEFINITIONS}",
        f"{_CARD_MARK}, on text that was held out of the training where the table says so.",
    ]
    return ModelCard("\n\n".join(parts) + "\n").content


def _of_trainings(ids: Mapping[str, Result], name: str) -> list[str]:
    """Returns what the records of the SAEs say of their trainings: each value once, none where they are silent."""
    values = (result.evaluated.sae.cfg.metadata.get(name) for result in ids.values())
    return list(dict.fromkeys(value for value in values if isinstance(value, str)))


def _section(repository: str, sae_id: str, result: Result) -> list[str]:
    """Returns the card's paragraphs about one SAE."""
    summary, tokens = result.summary, _unfinished_after(result.evaluated.file.path)
    fallback = f" (in place of {summary['fallback_from']})" if summary["fallback_from"] else ""
    own = result.evaluated.sae.cfg.metadata
    trained_at = f"; trained at {own.hook_name}" if own.hook_name not in (None, summary["hook_name"]) else ""
    parts = [
        f"## {sae_id}",
        *([f"**Not finished**: its run saved it after {tokens:,} tokens."] if tokens is not None else []),
        f"**{verdict(summary)}**. {shape(summary)}; measured with {summary['model']} on {summary['dataset']}{fallback},"
        f" {documents(summary)}: L0 on {summary['tokens']:,} tokens, losses on {summary['loss_tokens']:,}, dead"
        f" features on {summary['dead_feature_estimates']['tokens']:,}.",
        f"Hook: {place(summary)}{trained_at}. Positions: {positions(summary)}. {first_position_note(summary)}".strip(),
        "\n".join(markdown_table(*health_table(summary))),
        f'```python\nfrom sae_lens import SAE\n\nsae = SAE.from_pretrained("{repository}", "{sae_id}")\n```',
    ]
    if isinstance(began := own.initialized_from, dict):
        parts.append(_lineage(began))
    if recipe := training_recipe(Path(summary["sae"]["path"]), own.dataset_path if own.fallback_from else None):
        trained = "Trained with" if tokens is None else "Its run is"
        parts.append(f"{trained}\n\n```bash\npython sae_lens_train.py {recipe}\n```")
    return parts


def _unfinished_after(path: Path) -> int | None:
    """Returns after how many tokens a run saved an SAE before its end; None for other SAEs."""
    run = find_run_directory(path)
    checkpoint = next((each for each in (path.absolute(), path.absolute().parent) if each.parent == run), None)
    return int(checkpoint.name) if checkpoint and checkpoint.name.isdigit() else None


def _lineage(began: Mapping[str, Any]) -> str:
    """Returns the paragraph about the SAE that a training began with (`InitialSAE.lineage`)."""
    trained = "".join(
        f"{word} {began[name]}" for name, word in (("model_name", " of"), ("hook_name", " at")) if began.get(name)
    )
    return (
        f"Its training began with the weights of {began.get('name')}, an SAE{trained} (SHA-256 of the weights"
        f" `{began.get('weights_sha256')}`)."
    )


def training_recipe(sae_path: Path, fallback: str | None = None) -> str | None:
    """Returns the flags of an SAE's training that differ from the defaults; None if its run recorded no flags.

    Args:
        sae_path: directory of the SAE.
        fallback: the data set that it was trained on in place of the one that was asked for.
    """
    directory = find_run_directory(sae_path)
    try:
        flags = dict(json.loads((directory / FLAGS_FILENAME).read_text())) if directory else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    if flags is None:
        return None
    if fallback is not None:  # its configuration, split and column were chosen anew
        flags |= {"dataset_path": fallback, "dataset_config": None, "dataset_split": None, "text_column": None}
    as_given = {"recipe": "seed", "chosen": []}  # what was chosen is written out: a later recipe may differ
    return shlex.join(training_words(flags | as_given, leave_out=_NOT_RECIPE))


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("embedded:", ".", "/")) and not Path(name).exists()
