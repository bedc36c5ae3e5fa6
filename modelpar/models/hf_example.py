"""Random samples for a model of transformers, made from what its forward takes and its config says."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelpar.errors import ConfigError, describe

IMAGE_SIZE = 224
"""Pixels per side, where neither the user nor the config says."""


def example_batch(
    model: nn.Module, config: Any, num_examples: int, sequence_length: int, image_size: int | None
) -> dict[str, Tensor]:
    """Returns keyword arguments for the model's forward, with the labels that make it compute its loss.

    They are int64 `input_ids` (num_examples, sequence_length), or float32 `pixel_values` (num_examples, channels,
    height, width); and `labels` as the model's output asks for. Raises ConfigError for a model that takes other inputs,
    or no labels.
    """
    name, main = type(model).__name__, getattr(model, "main_input_name", None)
    takes = inspect.signature(model.forward).parameters
    if "labels" not in takes:
        raise ConfigError(f"the forward of {name} takes no labels, so it computes no loss; expected another model.head")
    generator = torch.Generator().manual_seed(0)
    if main == "input_ids":
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and 0 < limit < sequence_length:  # -1 says that there is none
            raise ConfigError(f"model.sequence_length is {sequence_length}; this {name} has {limit} positions")
        inputs = _tokens(config.get_text_config(), (num_examples, sequence_length), generator)
    elif main == "pixel_values":
        side = image_size or getattr(config, "image_size", None) or IMAGE_SIZE
        height, width = (side, side) if isinstance(side, int) else side
        channels = getattr(config, "num_channels", 3)
        inputs = torch.randn(num_examples, channels, height, width, generator=generator)
    else:
        raise ConfigError(
            f"the main input of {name} is {main}; expected a model of input_ids or pixel_values, or model=file with a "
            "function that makes its batch"
        )
    try:
        batch = {main: inputs, "labels": _labels(model, config, main, inputs, generator)}
        loss = _run(model, batch)["loss"]
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(describe(error).split())
        raise ConfigError(f"{name} failed on random samples of {main} {list(inputs.shape)}: {reason}") from error
    if not isinstance(loss, Tensor) or loss.dim():
        raise ConfigError(f"{name} computes no loss from random labels; expected another model.head")
    return batch


def _tokens(config: Any, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns random tokens, none of them the one for padding."""
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    padding = getattr(config, "pad_token_id", None)
    return tokens if padding is None else torch.where(tokens == padding, (padding + 1) % config.vocab_size, tokens)


def _labels(model: nn.Module, config: Any, main: str, inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Returns labels of the kind that the model's output is compared with."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    try:
        output = _run(model, {main: inputs[:2]})
    except ValueError:
        if not getattr(config, "is_encoder_decoder", False):
            raise
        return _tokens(config.get_text_config(), tuple(inputs.shape), generator)  # its decoder begins with the labels
    if "logits" not in output:
        raise ConfigError(
            f"{type(model).__name__} returns {', '.join(output)}, and no logits to make up labels for; expected "
            "another model.head, or model=file with a function that makes its batch"
        )
    logits = output["logits"]
    if logits.dim() == 4:  # a class per pixel
        shape, classes = (len(inputs), *inputs.shape[2:]), logits.shape[1]
    else:
        shape, classes = (len(inputs), *logits.shape[1:-1]), logits.shape[-1]
    if main == "input_ids" and shape == tuple(inputs.shape) and classes == vocabulary:
        return inputs.clone()  # language models shift them themselves
    return (
        torch.randint(classes, shape, generator=generator) if classes > 1 else torch.randn(shape, generator=generator)
    )


def _run(model: nn.Module, batch: dict[str, Tensor]) -> Mapping[str, Any]:
    """Runs a few samples in eval mode; leaves the random generators as they were."""
    few = {name: value[:2] for name, value in batch.items()}
    training = model.training
    with torch.random.fork_rng(), torch.no_grad():
        try:
            return model.eval()(**few)
        finally:
            model.train(training)
