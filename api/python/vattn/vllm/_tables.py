"""The tables that a model's rows are coded with, and the check that they are this model's."""

import pathlib
import re
from typing import Any

from ..tables import config_fingerprint
from ._options import Options

_KEYS = re.compile(r"(?:^|\.)layers?\.(\d+)\..*\b(k_proj|qkv_proj|query_key_value|c_attn)\.weight$")


def tables_of(options: Options, config: Any) -> str | None:
    """The file of tables to use; None with policy dense. Raises where there is none."""
    if options.dense:
        return None
    if options.tables is not None:
        if not pathlib.Path(options.tables).is_file():
            raise ValueError(f"additional_config.vattn.tables is {options.tables}: no such file")
        return options.tables
    folder = _folder(config)
    if folder is not None and (folder / "vattn.tables").is_file():
        return str(folder / "vattn.tables")
    model, where, then = "MODEL_FOLDER", "model.tables", "add the option"
    if folder is not None:
        model, where, then = str(folder), f"{folder}/vattn.tables", "start again, without an option or with"
    raise ValueError(
        "vattn needs tables of this model, by which it codes keys; there are none. Make them once, "
        "from texts like those that will be served:\n"
        f"    python -m vattn.tables {model} TEXT_FILES --out {where}\n"
        f'and {then} --additional-config \'{{"vattn": {{"tables": "{where}"}}}}\'. '
        '(Without tables every row is read by "policy": "dense".)'
    )


def _folder(config: Any) -> pathlib.Path | None:
    """Where the model's files are: the folder that was named, or the hub's cache."""
    model = config.model_config.model
    if pathlib.Path(model).is_dir():
        return pathlib.Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(model, "config.json", revision=config.model_config.revision)
    except HFValidationError:  # a file's path
        return None
    return pathlib.Path(file).parent if isinstance(file, str) else None


def model_of(config: Any) -> str | None:
    """The model's fingerprint from the weights in its folder; None where they cannot be read."""
    folder = _folder(config)
    weights = {} if folder is None else _key_weights(folder)
    text = config.model_config.hf_text_config
    layers = text.num_hidden_layers
    if sorted(weights) != list(range(layers)):
        return None
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    full = [kind == "full_attention" for kind in kinds]
    return config_fingerprint(text, full, (weights[layer]() for layer in range(layers) if full[layer]))


def _key_weights(folder: pathlib.Path) -> dict[int, Any]:
    """layer -> function that reads the weight of its key projection."""
    from safetensors import safe_open

    found: dict[int, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
        for name in names:
            match = _KEYS.search(name)
            if match:
                found.setdefault(int(match[1]), lambda file=file, name=name: _read(file, name))
    return found


def _read(file: pathlib.Path, name: str) -> Any:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)
