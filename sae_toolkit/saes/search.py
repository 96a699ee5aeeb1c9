"""Finds SAEs by name: directories, runs, checkpoints, patterns, SAELens's releases, and repositories of the Hub."""

from __future__ import annotations

import difflib
import glob
import logging
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.file_download import repo_folder_name
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from sae_toolkit.errors import UserError
from sae_toolkit.files.hub import check_repository
from sae_toolkit.files.trust import leaves_its_directory
from sae_toolkit.saes.foreign import hook_of_hookpoint, is_dictionary_checkpoint
from sae_toolkit.saes.formats import (
    FILES,
    WHAT_IS_AN_SAE,
    SAEFile,
    download_failure,
    library_of,
    library_with,
    recognize_sae,
)
from sae_toolkit.saes.published import publisher_with_name

log = logging.getLogger(__name__)


def find_saes(names: Sequence[str], *, layer: int | None = None, flag: str = "--sae_path") -> list[SAEFile]:
    """Finds the SAEs that a user named, in the given order and without repetitions.

    Args:
        names: each is one of these:
            - the directory of an SAE, or a file of it;
            - a run directory with `final_*` or numeric checkpoints: all of them, ordered by tokens, the final one last;
            - such a checkpoint with SAEs of several hooks;
            - a pattern (`runs/*`);
            - a directory or Hugging Face repository of several SAEs, with the SAE's folder after a colon
              (`EleutherAI/sae-llama-3-8b-32x:layers.12`);
            - `release:sae_id` of SAELens.
        layer: if a directory or repository holds several SAEs, take the one for the output of this layer.
        flag: the flag that gave the names, for messages.

    Raises:
        UserError: a name leads to no SAE, or to several SAEs where the user has to choose one.
    """
    found = {(file.path.resolve(), file.release): file for name in names for file in _find(name, layer, flag)}
    local = [file.path.absolute() for file in found.values() if not file.name]
    return [replace(file, name=file.name or _short_name(file.path.absolute(), local)) for file in found.values()]


def _find(name: str, layer: int | None, flag: str) -> list[SAEFile]:
    """Returns the SAEs that one name leads to. SAEs in local directories have no name for tables yet."""
    path = Path(name).expanduser()
    if path.exists():
        return _in_directory(path, None, layer, f"{flag} {name}")
    if glob.has_magic(name):
        return _of_pattern(str(path), layer, f"{flag} {name}")
    head, _, part = name.partition(":")
    if leaves_its_directory(part):
        raise UserError(f"{flag} {name}: {part} is not within {head}")
    if part and Path(head).expanduser().is_dir():
        return _in_directory(Path(head).expanduser(), part, layer, f"{flag} {head}")
    releases = get_pretrained_saes_directory()
    if head in releases:
        return [_release(head, part, flag)]
    first = path.parts[0] if path.parts else name
    if re.fullmatch(r"[\w.-]+/[\w.-]+", head) and not (first in (".", "..", "~") or Path(first).is_dir()):
        return [_on_hub(head, part or None, layer, flag)]
    if part:
        near = difflib.get_close_matches(head, releases, n=3, cutoff=0.5)
        hint = f"; the closest are {', '.join(near)}" if near else ""
        raise UserError(f"{flag} {name}: no such directory, and no SAELens release {head!r}{hint}")
    raise UserError(f"{flag} {name}: no such directory")


def _in_directory(directory: Path, part: str | None, layer: int | None, where: str) -> list[SAEFile]:
    if not directory.is_dir():
        return [_of_file(directory, where)]
    if part is None and library_of(directory) is not None:
        return [recognize_sae(directory, "", where)]
    if part is None and (checkpoints := _checkpoints(directory, layer) or _of_hooks(directory, layer)):
        return _of_many(checkpoints, where)
    if part is not None and library_of(directory / part) is not None:
        return [recognize_sae(directory / part, "", where)]
    saes = _inside(directory)
    if not saes:
        raise UserError(f"{where}: no SAE in it; looked for {WHAT_IS_AN_SAE}")
    return [recognize_sae(directory / _choose(saes, part, layer, where), "", where)]


def _of_file(file: Path, where: str) -> SAEFile:
    """Returns the SAE that a file is, or the SAE of a directory that the file belongs to."""
    if library_of(file) is not None:
        return recognize_sae(file, "", where)
    for directory in file.absolute().parents[:2]:  # Llama Scope's weights are one directory further down
        library = library_of(directory)
        if library is not None and file.absolute() in [directory / name for name in FILES[library]]:
            return recognize_sae(directory, "", where)
    raise UserError(f"{where}: a file; name the directory of the SAE, which has {WHAT_IS_AN_SAE}")


def _inside(directory: Path) -> set[str]:
    """Returns the relative paths of all SAEs in a directory and below it."""
    first_files = {files[0] for files in FILES.values()}
    saes: set[Path] = set()
    for parent, directories, names in os.walk(directory):  # passes over what a run has just renamed, unlike Path.rglob
        # Hidden directories are being written, or are left over from processes that were killed while they wrote.
        directories[:] = [name for name in directories if not name.startswith(".")]
        for name in names:
            path = Path(parent) if name in first_files else Path(parent, name)
            # Checkpoints of a dictionary whose training has ended are taken only if they are named.
            has_ended = is_dictionary_checkpoint(path) and library_of(path.parents[1]) is not None
            if (name in first_files or path.is_file()) and library_of(path) is not None and not has_ended:
                saes.add(path.relative_to(directory))
    return {str(path) for path in saes if not path.name.startswith(".")}


def _checkpoints(directory: Path, layer: int | None = None) -> list[Path]:
    """Returns the SAEs of a run's checkpoints, ordered by tokens, with the final one last.

    dictionary_learning's checkpoints are files in a directory `checkpoints`, ordered by steps.
    """
    files = [file for place in (directory, directory / "checkpoints") for file in place.glob("ae_*.pt")]
    if checkpoints := [file for file in files if library_of(file) is not None]:
        return sorted(checkpoints, key=lambda file: _natural(file.name))
    numbered = sorted(
        (not child.name.isdigit(), int(child.name.removeprefix("final_")), child)
        for child in directory.iterdir()
        if child.is_dir() and re.fullmatch(r"(final_)?\d+", child.name)
    )
    return [
        sae
        for _, _, child in numbered
        for sae in ([child] if library_of(child) is not None else _of_hooks(child, layer))
    ]


def _of_hooks(directory: Path, layer: int | None) -> list[Path]:
    """Returns the SAEs of a checkpoint that has several; of those for each hook only a layer's, if it is given."""
    if not re.fullmatch(r"(final_)?\d+", directory.name):
        return []
    children = sorted(directory.iterdir(), key=lambda child: _natural(child.name))
    saes = [child for child in children if library_of(child) is not None]
    of_layer = () if layer is None else (f"blocks.{layer}.", "seed_")  # seeds are all of one hook
    return [sae for sae in saes if layer is None or sae.name.startswith(of_layer)]


def _choose(folders: Collection[str], part: str | None, layer: int | None, where: str) -> str:
    """Returns the folder that the user meant: by its name, by its layer, or because it is the only one."""
    wanted = ""
    chosen = list(folders)
    if part is not None:
        wanted = f"no {part} among them; "
        chosen = [folder for folder in folders if folder == part.strip("/")]
    elif "." in folders:
        chosen = ["."]
    elif layer is not None:
        wanted = f"not exactly one of them is for layers.{layer}; "
        chosen = [f for f in folders if _is_of_layer(f, layer)]
    if len(chosen) == 1:
        return chosen[0]
    in_order = sorted(folders, key=_natural)
    listed = f"{', '.join(in_order[:8])}{', ...' if len(in_order) > 8 else ''}"
    name = where.partition(" ")[2]
    raise UserError(f"{where}: holds {len(folders)} SAEs: {listed}; {wanted}name one, as in {name}:{in_order[0]}")


def _is_of_layer(folder: str, layer: int) -> bool:
    """Returns whether a path is that of a layer's SAE, as sparsify, Gemma Scope and Qwen Scope name it."""
    names = Path(folder).parts
    return (
        f"layer_{layer}" in names
        or names[-1] == f"layer{layer}.sae.pt"
        or hook_of_hookpoint(names[-1]) == f"blocks.{layer}.hook_resid_post"
    )


def _of_pattern(pattern: str, layer: int | None, where: str) -> list[SAEFile]:
    directories: list[Path] = []
    for match in sorted(glob.glob(pattern, recursive=True), key=_natural):  # noqa: PTH207  Path.glob refuses absolute patterns
        directory = Path(match)
        if library_of(directory) is not None:
            directories.append(directory)
        elif directory.is_dir():
            directories += _checkpoints(directory, layer) or _of_hooks(directory, layer)
    if not directories:
        raise UserError(f"{where}: the pattern fits no SAE; looked for {WHAT_IS_AN_SAE}")
    return _of_many(directories, where)


def _of_many(directories: Sequence[Path], where: str) -> list[SAEFile]:
    """Returns the SAEs of directories that were not named one by one. Damaged ones are left out if others remain."""
    saes: list[SAEFile] = []
    errors: list[UserError] = []
    for directory in directories:
        try:
            saes.append(replace(recognize_sae(directory, "", f"{where}: {directory.name}"), one_of_many=True))
        except UserError as error:
            errors.append(error)
    if not saes:
        raise errors[0]
    for left_out in errors:
        log.warning("%s; left out", left_out)
    return saes


def _natural(text: str) -> list[tuple[int, str]]:
    """Returns a sort key that orders numbers within text by their value."""
    return [(int(token), "") if token.isdigit() else (-1, token) for token in re.split(r"(\d+)", text)]


def _short_name(path: Path, all_paths: Sequence[Path]) -> str:
    """Returns the fewest last parts of a path that tell it from the other paths."""
    others = [other.parts for other in all_paths if other != path]
    n_parts = 1
    while any(other[-n_parts:] == path.parts[-n_parts:] for other in others):
        n_parts += 1
    return str(Path(*path.parts[-n_parts:]))


def _release(release: str, sae_id: str, flag: str) -> SAEFile:
    lookup = get_pretrained_saes_directory()[release]
    if sae_id not in lookup.saes_map:
        near = difflib.get_close_matches(sae_id, lookup.saes_map, n=3, cutoff=0) or list(lookup.saes_map)[:3]
        raise UserError(
            f"{flag} {release}{':' if sae_id else ''}{sae_id}: SAELens's release {release} has"
            f" {len(lookup.saes_map)} SAEs, and none of that id; give one of them, such as {release}:{near[0]}"
            + "".join(f", {sae}" for sae in near[1:])
        )
    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=lookup.repo_id, repo_type="model")
    if not repository.is_dir():
        check_repository(lookup.repo_id, "model", f"{flag} {release}:{sae_id}, of")
    return SAEFile(f"{release}:{sae_id}", repository, "SAELens", "release", (release, sae_id))


def _on_hub(repository: str, part: str | None, layer: int | None, flag: str) -> SAEFile:
    """Returns an SAE of a Hugging Face repository, from the local cache if possible."""
    where = f"{flag} {repository}"
    likely = [part] if part else [".", *([] if layer is None else [f"layers.{layer}"])]
    try:
        folder = next((folder for folder in likely if _cached(repository, folder)), None)
    except HFValidationError:
        folder = None  # `check_repository` refuses the name below
    if folder is None:
        repository = check_repository(repository, "model", flag)
        try:
            folder = _download(repository, part, layer, where)
        except (OSError, HfHubHTTPError, httpx2.TransportError) as error:
            raise UserError(f"{where}: cannot be downloaded: {download_failure(error)}") from error
    directory = _cached(repository, folder)
    assert directory is not None
    return recognize_sae(directory, repository if folder == "." else f"{repository}:{folder}", where)


def _cached(repository: str, folder: str) -> Path | None:
    """Returns the path of a repository's SAE in the Hub's local cache; None if it is not complete there."""
    if publisher_with_name(Path(folder).name) is not None:
        file = try_to_load_from_cache(repository, folder)
        return Path(file) if isinstance(file, str) else None
    for files in FILES.values():
        cached = [try_to_load_from_cache(repository, str(Path(folder) / file)) for file in files]
        if all(isinstance(file, str) for file in cached):
            return Path(str(cached[0])).parent
    return None


def _download(repository: str, part: str | None, layer: int | None, where: str) -> str:
    """Downloads the SAE that the user meant, and returns its folder or only file in the repository."""
    names = set(HfApi().list_repo_files(repository))
    folders = {str(folder) for name in names for folder in Path(name).parents}
    saes = {folder for folder in folders if library_with(names, folder) is not None}
    saes |= {name for name in names if publisher_with_name(Path(name).name) is not None}
    if not saes:
        raise UserError(f"{where}: no SAE in this repository; looked for {WHAT_IS_AN_SAE}")
    folder = _choose(saes, part, layer, where)
    wanted = {file for files in FILES.values() for file in files} | {ACTIVATION_SCALER_CFG_FILENAME}
    patterns = [folder, *(str(Path(folder) / file) for file in wanted)]
    # sparsify's record of the model and the text is in the folder above.
    patterns += [str(parent / "config.json") for parent in Path(folder).parents]
    snapshot_download(repository, allow_patterns=patterns)
    return folder
