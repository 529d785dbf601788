"""MODEL references to files on this disk, wherever some tool has put them; and all models that are here.

    resolve("qwen3-30b-a3b:Q4_K_M")      # in the Hugging Face cache, LM Studio's folders, Ollama's store, or made here
    resolve("model.gguf")                # a path; then nothing else is looked at

Nothing is downloaded here, and nothing is changed.
"""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moelocal.errors import BadRequest, ModelNotFound
from moelocal.paths import hub_folder, user_home, user_path

if TYPE_CHECKING:
    from moelocal.model.cache import Shelf
    from moelocal.model.reference import Reference
    from moelocal.model.stored import Stored

_TRY = 'To try the program: moelocal run demo "Who are you?"'
_N_CLOSEST = 3
DEMO = Path(__file__).parent / "demo" / "demo.gguf"


def _silent(_: str) -> None:
    pass


def resolve(reference: str, tell: Callable[[str], None] = _silent) -> Path:
    """The file of a MODEL reference: `demo`, a path, or a model that is here by its name.

    Args:
        tell: gets what is good to know about the choice.

    Raises:
        ModelNotFound: with the next thing to type.
        BadRequest: a name that no file can have, one that leads out of its repository, or that several models have.
    """
    if reference == "demo":
        return DEMO
    if not reference.strip():
        raise ModelNotFound("The name of the model is empty.", _TRY)
    path = user_path(reference)
    shown = reference if len(reference) < 80 else reference[:77] + "..."
    try:
        is_folder, exists = path.is_dir(), path.exists() or path.is_symlink()
    except OSError as error:
        raise ModelNotFound(f"The model {shown!r} cannot be looked at: {error.strerror}.", _TRY) from error
    if exists and not is_folder:
        _tell_of_namesake(reference, tell)
        return path
    parsed = None
    if not _is_plainly_a_path(reference):
        from moelocal.model.reference import Reference

        parsed = _parsed(reference, shown)
        if (model := find_stored(parsed or Reference(reference, reference))) is not None:
            return model.path
    if is_folder:
        found = _beside(path)
        there = f"Name a file in it: {', '.join(found[:_N_CLOSEST])}" if found else "It holds no .gguf file."
        raise ModelNotFound(f"{shown} is a folder, not a model file.", there)
    raise _not_here(reference, shown, path, parsed)


def find_stored(reference: Reference) -> Stored | None:
    """The model here that a reference means; None: there is none, in no quantization.

    Raises:
        ModelNotFound: there is something of it, but not this, or not all of it.
        BadRequest: it could be one of several.
    """
    from moelocal.model.cache import shelf_of
    from moelocal.model.others import lmstudio_models, ollama_model

    model = _made_here(reference)
    if model is not None:
        return model
    shelf: Shelf | None = None
    models: list[Stored] = []
    if reference.repo:
        names = {reference.repo.lower(): reference.name}
        shelf = shelf_of(reference.repo, reference.name)
        models = [*(shelf.models if shelf else ()), *_joined(reference.repo), *lmstudio_models(names, reference.repo)]
        if (chosen := _chosen(reference, models)) is not None:
            return chosen
    for name in (reference.text, f"hf.co/{reference.text}"):
        if (model := ollama_model(name)) is not None:
            return model
    if models or (shelf and shelf.halves):
        raise _other_than_asked(reference, models, shelf)
    return None


def _chosen(reference: Reference, models: list[Stored]) -> Stored | None:
    """The one that is meant, of a repository's models here.

    Raises:
        BadRequest: several could be.
    """
    if reference.file:
        name = reference.file.lower()
        fits = [model for model in models if name in (file.lower() for file in _files(model))]
        return fits[0] if fits else None
    if reference.quant:
        quant = reference.quant.upper()
        return next((model for wanted in (quant, f"UD-{quant}") for model in models if model.quant == wanted), None)
    preferred = reference.entry.quant if reference.entry else "Q4_K_M"
    fits = [model for model in models if model.quant == preferred] or models
    if len({model.name for model in fits}) > 1:
        names = [model.name for model in models]
        raise BadRequest(f"{reference.shown} is here more than once.", f"Say which: {_list_of(names)}")
    return fits[0] if fits else None


def _files(model: Stored) -> list[str]:
    """Names in the repository of all shards; each by itself too."""
    folder = model.file.rpartition("/")[0]
    names = [f"{folder}/{file.name}" if folder else file.name for file in model.files]
    return [*names, *(file.name for file in model.files)]


def _other_than_asked(reference: Reference, models: list[Stored], shelf: Shelf | None) -> ModelNotFound:
    pull = f"moelocal pull {shlex.quote(reference.text)}"
    if models:
        names = _list_of([model.name for model in models])
        return ModelNotFound(
            f"{reference.shown} is not on this disk; of that model there is {names}.", f"To get it: {pull}"
        )
    half = shelf.halves[0] if shelf else None
    missing = f"{half.file.rpartition('/')[2]} lacks {len(half.missing)} of its files" if half else "nothing"
    return ModelNotFound(f"{reference.shown} is here only in part: {missing}.", f"To get the rest: {pull}")


def models_here() -> Iterator[Stored]:
    """Every model on this disk that has a name, each file once: made here, downloaded, of other tools; not the demo."""
    seen: set[tuple[int, int]] = set()
    for model in all_names():
        try:
            status = model.path.stat()
        except OSError:
            continue
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            yield model


def all_names() -> Iterator[Stored]:
    """The same, under every name that a file has."""
    from moelocal.model.cache import shelves
    from moelocal.model.catalog import entries
    from moelocal.model.others import lmstudio_models, ollama_models

    names = {entry.repo.lower(): entry.name for entry in entries()}
    yield from made_here()
    for shelf in shelves(names):
        yield from shelf.models
    yield from lmstudio_models(names)
    yield from ollama_models()


def made_folder() -> Path:
    """Where models are that were made here."""
    return user_home() / "models"


def made_here() -> Iterator[Stored]:
    """Models that moelocal made."""
    from moelocal.model.stored import Stored, files_below, models_among, quant_of, stem_of

    folder = made_folder()
    for files in models_among(files_below(folder))[0]:
        paths = tuple(folder / file for file in files)
        yield Stored(stem_of(files[0]), paths, "moelocal", quant_of(files[0]), file=files[0])


def begun_here(repo: str = "") -> list[Path]:
    """Files of models whose pieces are being joined, and are not whole: of one repository, or of all."""
    from moelocal.model.cache import PARTIAL
    from moelocal.model.stored import files_below

    start = f"{repo}-".lower()
    return [
        made_folder() / file
        for file in files_below(made_folder())
        if file.endswith(PARTIAL) and (not repo or Path(file).as_posix().lower().startswith(start))
    ]


def _made_here(reference: Reference) -> Stored | None:
    names = {reference.text.lower(), reference.text.lower().removesuffix(".gguf")}
    if reference.quant:
        names.add(f"{reference.name}-{reference.quant}".lower())
    return next((model for model in made_here() if model.name.lower() in names), None)


def _joined(repo: str) -> list[Stored]:
    """Models of a repository whose files were cut up there, and are one here: models/OWNER/REPO-QUANT.gguf."""
    return [model for model in made_here() if model.name.lower() == f"{repo}-{model.quant}".lower()]


def _is_plainly_a_path(text: str) -> bool:
    return os.path.isabs(text) or text.startswith(("./", "../", "~", ".\\", "..\\"))


def _parsed(reference: str, shown: str) -> Reference | None:
    from moelocal.model.reference import parse_reference

    try:
        return parse_reference(reference)
    except BadRequest as error:
        raise BadRequest(f"There is no file {shown}; of the hub's, {error.message}", error.hint) from error


def _tell_of_namesake(reference: str, tell: Callable[[str], None]) -> None:
    """Says so when a file is taken whose name a model has too. Cheap: looks at one folder, and only for such names."""
    parts = reference.split("/")
    if _is_plainly_a_path(reference) or (reference.endswith(".gguf") and len(parts) != 3):
        return
    if len(parts) == 1:
        from moelocal.model.catalog import find

        entry = find(reference.partition(":")[0])
        repo = entry.repo if entry else ""
    else:
        repo = f"{parts[0]}/{parts[1].partition(':')[0]}"
        repo = repo if len(parts) <= 3 and _is_cached(repo) else ""
    if repo:
        tell(f"{reference} is taken as the file of that name; the model is {repo}.")


def _is_cached(repo: str) -> bool:
    try:
        return (hub_folder() / f"models--{repo.replace('/', '--')}").is_dir()
    except (OSError, RuntimeError):
        return False


def _beside(folder: Path) -> list[str]:
    try:
        return sorted(str(one) for one in folder.glob("*.gguf"))
    except OSError:
        return []


def _not_here(reference: str, shown: str, path: Path, parsed: Reference | None) -> ModelNotFound:
    """What to say of a model that is not on this disk: the closest names, or how to get it."""
    files = _beside(path.parent)
    close = difflib.get_close_matches(str(path), ["demo", *files], n=_N_CLOSEST, cutoff=0.7)
    is_path = parsed is None or (reference.endswith(".gguf") and (not parsed.repo or path.parent.is_dir()))
    if parsed is not None and parsed.repo and not is_path:
        pull = f"moelocal pull {shlex.quote(reference.strip())}"
        close = close or alike(reference) * (parsed.entry is None)
        hint = f"Did you mean {_either(close)}? Or: {pull}" if close else f"To get it: {pull}"
        return ModelNotFound(f"{shown} is not on this disk.", hint)
    if not is_path:
        close = close or alike(reference)
    what = "neither demo nor the path of a .gguf file" if is_path else "no file, and no model here or in the catalog"
    more = _TRY if is_path else "What there is: moelocal list --all"
    return ModelNotFound(
        f"There is no model {shown!r}: it is {what}.", f"Did you mean {_either(close)}?" if close else more
    )


def alike(reference: str) -> list[str]:
    """Names of models, here and in the catalog, that may have been meant."""
    from moelocal.model.catalog import closest
    from moelocal.model.quants import quant_in_name

    name, _, tag = reference.partition(":")
    quant = quant_in_name(tag)
    found = [f"{one}:{quant}" if quant else one for one in closest(name.rpartition("/")[2].removesuffix("-GGUF"))]
    here = [model.name for model in models_here()]
    wanted = reference.lower()
    near = difflib.get_close_matches(wanted, [one.lower() for one in here], n=_N_CLOSEST, cutoff=0.7)
    found += [one for one in here if one.lower() in near]
    return list(dict.fromkeys(found))[:_N_CLOSEST]


def _either(names: list[str]) -> str:
    return " or ".join(names)


def _list_of(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
