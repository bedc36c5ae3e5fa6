"""Verifies a sample of transformers' model types, tiny and random: which of them split to the bit, and why not others.

scripts/zoo runs the sample, scripts/zoo LlamaConfig BertConfig those two; any config class of transformers may be
named. A line per model says its type, its layers, in how many stages it was equal to the unsplit model, or the reason
in one line. The last line is the share that passed; the exit code is 1 where that is less than --least.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from torch import nn

from modelpar import Objective, plan
from modelpar.errors import ModelparError, describe
from modelpar.models import hf
from modelpar.planning import partitioners
from modelpar.proof import verify

SAMPLES, LENGTH, VOCABULARY, SIDE = 4, 16, 64, 32
TINY = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "decoder_start_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "attention_dropout": 0.1, "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1, "image_size": SIDE, "patch_size": 8, "num_local_experts": 4, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "encoder_layers": 3, "decoder_layers": 3, "d_model": 16,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "embedding_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "d_ff": 32, "d_kv": 8, "num_layers": 3,
    "state_size": 4, "conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (4, 2), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "sliding_window": 8, "num_labels": 3,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 16,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
"""Sizes by the names that config classes have for them; each class gets those that it knows."""

LARGEST = 30_000_000
"""Parameters: a class whose sizes have other names than those is not tried."""

SOUND = "AutoModelForAudioClassification"
PICTURE = {"hidden_sizes": [8, 16], "depths": [1, 2]}
CHOSEN: dict[str, dict[str, Any]] = {
    # decoders
    "GPT2Config": {}, "GPTNeoXConfig": {}, "GPTJConfig": {"rotary_dim": 4}, "OPTConfig": {}, "BloomConfig": {},
    "FalconConfig": {}, "LlamaConfig": {}, "MistralConfig": {}, "Qwen2Config": {}, "Qwen3Config": {},
    "GemmaConfig": {}, "Gemma2Config": {}, "Gemma3TextConfig": {}, "PhiConfig": {}, "Phi3Config": {},
    "StableLmConfig": {}, "Olmo2Config": {}, "CohereConfig": {},
    # mixtures of experts
    "MixtralConfig": {"output_router_logits": True}, "Qwen2MoeConfig": {},
    "GptOssConfig": {},
    # encoders
    "BertConfig": {}, "RobertaConfig": {}, "DistilBertConfig": {"dim": 16, "n_layers": 3, "n_heads": 2},
    "AlbertConfig": {},
    "ElectraConfig": {}, "DebertaV2Config": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "ModernBertConfig": {}, "XLNetConfig": {"n_head": 2, "d_inner": 32},
    # encoders with decoders
    "T5Config": {}, "BartConfig": {}, "MarianConfig": {},
    # pictures
    "ViTConfig": {}, "DeiTConfig": {},
    "SwinConfig": {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 2, "patch_size": 4},
    "ResNetConfig": {**PICTURE, "embedding_size": 8, "layer_type": "basic"},
    "ConvNextConfig": {**PICTURE, "num_stages": 2},
    # sound
    "Wav2Vec2Config": {"head": SOUND}, "WhisperConfig": {"head": SOUND, "num_mel_bins": 8, "max_source_positions": 8},
    # state spaces
    "MambaConfig": {},
}  # fmt: skip
"""The sample: config classes, with what is not in TINY or must differ from it."""


class Outcome(NamedTuple):
    """What came of one model."""

    passed: bool
    model: str
    layers: int
    what: str
    """ "equal", or the reason in one line."""
    made: bool = True
    """False where there is no tiny model of this type to try."""


def main() -> int:
    """Runs the models named, or the sample; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="a config class (default: a sample of 40)")
    parser.add_argument("--stages", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--limit", type=float, default=120, metavar="SECONDS", help="per model (default: %(default)s)")
    parser.add_argument("--least", type=float, default=95, metavar="PERCENT", help="(default: %(default)s)")
    options = parser.parse_args()
    names = options.configs or list(CHOSEN)
    begun, passed, made = time.monotonic(), 0, 0
    transformers.PreTrainedModel  # noqa: B018  (loads what all need, before there are child processes)
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as threads:
        for name, outcome in zip(names, threads.map(partial(_in_child, options), names), strict=True):
            passed, made = passed + outcome.passed, made + outcome.made
            shape = f"{outcome.layers:>3} layers, {options.stages} stages" if outcome.layers else " " * 20
            print(f"{name.removesuffix('Config'):<12} {outcome.model:<36} {shape}  {outcome.what}", flush=True)
    share = 100 * passed / max(1, made)
    print(f"{passed} of {made} equal to the bit: {share:.0f} %, in {time.monotonic() - begun:.0f} s")
    return 0 if share >= options.least else 1


def _in_child(options: argparse.Namespace, name: str) -> Outcome:
    """Tries one model in a process of its own, which a crash or the time limit ends."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sending, name, options.stages))
    child.start()
    sending.close()
    try:
        outcome = receiving.recv() if receiving.poll(options.limit) else None
        what = f"not done after {options.limit:.0f} s"
    except EOFError:
        child.join()
        code = child.exitcode or 0
        outcome, what = None, f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    child.kill()
    child.join()
    return outcome or Outcome(False, "", 0, what)


def _child(sending: Connection, name: str, stages: int) -> None:
    with open(os.devnull, "w") as nowhere:
        for number in (1, 2):  # what models print and log
            os.dup2(nowhere.fileno(), number)
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    *_, outcome = _tried(name, stages)
    sending.send(outcome)
    os._exit(0)


def _tried(name: str, stages: int) -> Iterator[Outcome]:
    """Yields outcomes, each of which says more than the one before; the last one is it."""
    kind, layers = "", 0
    torch.manual_seed(0)
    try:
        model, batch = tiny(name)
    except Exception as error:
        reason = " ".join(describe(error).split())
        yield Outcome(False, kind, layers, f"no tiny one can be made: {reason}", made=False)
        return
    try:
        kind = type(model).__name__
        objective = Objective(model)
        settings = {"num_microbatches": 2, "num_threads": 1, "profile": "flops", "tied": "exact"}
        decided = plan(objective, batch, num_ranks=stages, partitioner=partitioners.uniform, **settings)
        layers = len(decided.graph.layers)
        verdict = verify(objective, batch, decided, optimizer=partial(torch.optim.AdamW, lr=1e-3), steps=2)
        wrong = next((f"{check.what}: {check.detail}" for check in verdict.checks if not check.passed), "")
        yield Outcome(verdict.passed, kind, layers, f"not equal: {wrong}" if wrong else "equal")
    except Exception as error:
        own = "" if isinstance(error, ModelparError) else f"{type(error).__name__}, no error of modelpar: "
        yield Outcome(False, kind, layers, own + " ".join(describe(error).split()))


def tiny(name: str) -> tuple[nn.Module, tuple[dict[str, Any], None]]:
    """Returns a tiny random model of a config class, in training mode, with a batch for which it computes its loss."""
    kind = getattr(transformers, name)
    special = CHOSEN.get(name, {})
    sizes = {key: value for key, value in _sizes(kind).items() if kind.attribute_map.get(key) not in special}
    options = sizes | special
    head, side = options.pop("head", None), options.pop("image_size", None)
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModel.from_config(kind(**options)).parameters())
    if size > LARGEST:
        raise ModelparError(f"has {size / 1e6:.0f} million parameters with the sizes in TINY; expected more in CHOSEN")
    if head != SOUND:
        model, batch, _ = hf.build(name, head, LENGTH, side, SAMPLES, **options)
        return model, batch
    model = transformers.AutoModelForAudioClassification.from_config(kind(**options)).train()
    generator = torch.Generator().manual_seed(0)
    shape = (400,) if model.main_input_name == "input_values" else (options["num_mel_bins"], 16)
    sound = torch.randn(SAMPLES, *shape, generator=generator)
    labels = torch.randint(model.config.num_labels, (SAMPLES,), generator=generator)
    return model, ({model.main_input_name: sound, "labels": labels}, None)


def _sizes(kind: type) -> dict[str, Any]:
    """Returns those of the tiny sizes that a config class takes."""
    plain = kind()
    return {name: value for name, value in TINY.items() if _takes(kind, plain, name, value)}


def _takes(kind: type, plain: Any, name: str, value: Any) -> bool:
    usual = getattr(plain, name, ...)
    if usual is ... or isinstance(usual, list | tuple) != isinstance(value, tuple):
        return False
    try:
        kind(**{name: value})
    except (AttributeError, NotImplementedError):  # it can be read only
        return False
    except Exception:  # it does not fit the others' usual values
        return True
    return True


if __name__ == "__main__":
    sys.exit(main())
