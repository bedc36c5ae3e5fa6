"""Any model of transformers: `model=hf model.config=GPT2Config +model.n_layer=4`. Never asks the network."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from modelpar.errors import ConfigError, describe
from modelpar.models.hf_example import example_batch

HEADS = ("AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForImageClassification")
"""Which head a model gets where none is named: the first of these that it has."""


def build(
    config: str,
    head: str | None = None,
    sequence_length: int = 64,
    image_size: int | None = None,
    num_examples: int = 16,
    **options: Any,
) -> tuple[nn.Module, tuple[dict[str, Tensor], None], None]:
    """Returns a model with the loss that its head computes, and a batch of random samples that fit it.

    `config` is the name of a config class, for random weights, or a folder with a saved model. `options` are those of
    the config class. `head` is the name of a model class or of an AutoModelFor… class; by default the folder's, or the
    one that fits. Raises ConfigError, in one line, for what is not there or does not fit.
    """
    for name, value in (("sequence_length", sequence_length), ("num_examples", num_examples)):
        if value < 1:
            raise ConfigError(f"model.{name} is {value}; expected at least 1")
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"model=hf needs transformers ({error}); expected pip install 'modelpar[hf]'") from error
    with _quiet(transformers):
        folder = Path(config).expanduser() if Path(config).expanduser().is_dir() else None
        made = _config(transformers, config, folder, options, image_size)
        model = _model(_head(transformers, made, head, folder), made, folder)
        batch = example_batch(model, made, num_examples, sequence_length, image_size)
    return model.train(), (batch, None), None


def _config(
    transformers: ModuleType, name: str, folder: Path | None, options: dict[str, Any], image_size: int | None
) -> Any:
    """Returns the config, with its options; one that the class does not know is refused."""
    try:
        plain = transformers.AutoConfig.from_pretrained(folder, local_files_only=True) if folder else None
    except Exception as error:
        raise ConfigError(f"model.config names the folder {name}, which has no saved model: {_line(error)}") from error
    kind = type(plain) if folder else getattr(transformers, name, None) if name.isidentifier() else None
    if not hasattr(kind, "model_type"):
        known = [found for found in dir(transformers) if found.endswith("Config")]
        raise ConfigError(
            f"model.config is {name!r}, neither a config class of transformers nor a folder; "
            f"{_guess(name, known)}expected one such as GPT2Config or path/to/folder"
        )
    try:
        plain = _completed(plain or kind())
        if more := [key for key in options if not hasattr(plain, key)]:
            known = [key for key in plain.to_dict() if not key.startswith("_")]
            expected = _guess(more[0], known) or f"expected one of {', '.join(known)}"
            raise ConfigError(f"{kind.__name__} has no option {more[0]}; {expected.strip()}")
        if image_size is not None and hasattr(plain, "image_size"):
            options = {**options, "image_size": image_size}
        if hasattr(plain, "use_cache"):
            options = {"use_cache": False, **options}  # it is of use only where text is generated
        return _completed(kind.from_dict({**plain.to_dict(), **options}) if folder else kind(**options))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{kind.__name__} cannot be made with these options: {_line(error)}") from error


def _completed(config: Any) -> Any:
    """Gives a decoder behind an encoder a token to start with, where the config class has none."""
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
    return config


def _head(transformers: ModuleType, config: Any, name: str | None, folder: Path | None) -> Any:
    """Returns the model class."""
    kind = type(config)
    if name is None:
        saved = (getattr(config, "architectures", None) or [None])[0] if folder else None
        fitting = (found for head in HEADS if (found := getattr(transformers, head)._model_mapping.get(kind, None)))
        found = getattr(transformers, saved or "", None) or next(fitting, None)
        if found is None:
            raise ConfigError(f"{kind.__name__} has no usual head; expected model.head=…, {_heads(transformers, kind)}")
    else:
        found = getattr(transformers, name, None) if name.isidentifier() else None
        if hasattr(found, "_model_mapping"):
            found = found._model_mapping.get(kind, None)
        if not hasattr(found, "from_pretrained") or not isinstance(config, found.config_class or ()):
            raise ConfigError(f"{kind.__name__} has no head {name}; expected {_heads(transformers, kind)}")
    return found[0] if isinstance(found, tuple) else found


def _heads(transformers: ModuleType, kind: type) -> str:
    autos = (found for found in dir(transformers) if found.startswith("AutoModelFor"))
    has = [a for a in autos if getattr(getattr(transformers, a), "_model_mapping", {}).get(kind, None)]
    return f"one of {', '.join(has)}, or the name of a model class" if has else "the name of a model class"


def _model(head: Any, config: Any, folder: Path | None) -> nn.Module:
    """Returns the model; says in a line what a folder's weights leave out."""
    try:
        if folder is None:
            return head._from_config(config)
        model, report = head.from_pretrained(folder, config=config, local_files_only=True, output_loading_info=True)
    except Exception as error:
        raise ConfigError(f"{head.__name__} cannot be made: {_line(error)}") from error
    for key, what in (("missing_keys", "begin at random"), ("unexpected_keys", "are not used")):
        if names := sorted(report[key]):
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            where = "not in" if key == "missing_keys" else "in"
            print(f"modelpar: weights that are {where} {folder} {what}: {some}", file=sys.stderr)
    return model


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Keeps transformers from printing what it thinks of configs and weights, and progress bars."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def _guess(wrong: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {close[0]}? " if close else ""


def _line(error: Exception) -> str:
    return " ".join(describe(error).split())
