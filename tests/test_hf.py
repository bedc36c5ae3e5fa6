"""model=hf: any model of transformers, made from its config, with a batch that fits it."""

import subprocess
import sys

import pytest
import torch
from commands import call

from modelpar import config as configs
from modelpar.errors import ConfigError
from modelpar.models import hf
from modelpar.task import model_name, task_of

transformers = pytest.importorskip("transformers")

GPT2 = {"config": "GPT2Config", "n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
T5 = {"config": "T5Config", "d_model": 16, "num_layers": 2, "d_kv": 8, "num_heads": 2, "d_ff": 32, "vocab_size": 50}
RESNET = {"config": "ResNetConfig", "hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}
MODELS = {
    "GPT2LMHeadModel": GPT2,
    "GPT2ForSequenceClassification": {**GPT2, "head": "AutoModelForSequenceClassification", "pad_token_id": 0},
    "LlamaForCausalLM": {"config": "LlamaConfig", **SIZES, "vocab_size": 50},
    "BertForMaskedLM": {"config": "BertConfig", **SIZES, "vocab_size": 50},
    "BertForTokenClassification": {"config": "BertConfig", **SIZES, "head": "BertForTokenClassification"},
    "T5ForConditionalGeneration": T5,
    "ViTForImageClassification": {"config": "ViTConfig", **SIZES, "image_size": 16, "patch_size": 8},
    "ResNetForImageClassification": {**RESNET, "image_size": 32, "layer_type": "basic"},
}


def words(options, *more):
    """Returns the overrides that give these options."""
    own = ("config", "head", "image_size", "sequence_length", "num_examples")
    given = [f"{'' if name in own else '+'}model.{name}={value}" for name, value in options.items()]
    quick = ["transport=threads", "pipeline.num_threads=1", "pipeline.profile=flops", "pipeline.num_microbatches=2"]
    return ["model=hf", *given, *quick, "training.batch_size=4", "model.sequence_length=8", *more]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in which no process may be started."""
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments, **options):
        raise AssertionError(f"a process was started: {arguments}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    return tmp_path


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_its_head_and_a_batch_that_fits(name, capsys):
    torch.manual_seed(0)
    model, (batch, targets), loss = hf.build(**{**MODELS[name], "sequence_length": 8, "num_examples": 4})
    assert type(model).__name__ == name
    assert model.training
    assert (targets, loss) == (None, None)
    assert {len(value) for value in batch.values()} == {4}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert model(**batch).loss.shape == ()
    again = hf.build(**{**MODELS[name], "sequence_length": 8, "num_examples": 4})[1][0]
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    torch.manual_seed(0)
    state = hf.build(**MODELS[name])[0].state_dict()
    assert all(torch.equal(value, state[key]) for key, value in before.items())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", MODELS)
def test_the_split_model_is_the_same(folder, name):
    outcome = call("verify", *words(MODELS[name], "steps=2", "pipeline.num_ranks=3"))
    assert (outcome.code, outcome.err) == (0, ""), outcome.out
    assert "3 stages by optimal" in outcome.out


def test_it_trains_simulates_and_compares(folder):
    small = words(GPT2, "training.steps=2", "output.name=mine")
    trained = call("train", *small)
    assert (trained.code, trained.err) == (0, "")
    assert "samples drawn from the model's example batch of 16" in trained.out
    assert "bubble" in call("simulate", *words(GPT2, "pipeline.num_ranks=3")).out
    compared = call("compare", *words(GPT2, "partition=uniform,optimal", "measure=0"))
    assert (compared.code, compared.err) == (0, "")


def test_null_true_and_lists_are_handed_on():
    config = configs.load("train", words({**GPT2, "scale_attn_weights": "false", "n_inner": "null"}))
    task = task_of(config)
    assert task.objective.model.config.scale_attn_weights is False
    assert task.objective.model.config.n_inner is None
    assert task.example[0]["input_ids"].shape == (4, 8)
    assert model_name(config) == "GPT2Config"


def test_a_folder_gives_its_weights_and_head(folder, capsys):
    model, _, _ = hf.build(**GPT2)
    model.save_pretrained("saved")
    capsys.readouterr()
    again, _, _ = hf.build("saved")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert capsys.readouterr() == ("", "")
    hf.build("saved", n_layer=1)
    line = capsys.readouterr().err
    assert line.startswith("modelpar: weights that are in saved are not used: transformer.h.1.attn.c_attn.")
    assert line.count("\n") == 1
    hf.build("saved", head="AutoModelForSequenceClassification", pad_token_id=0)
    assert capsys.readouterr().err == "modelpar: weights that are not in saved begin at random: score.weight\n"


def test_what_transformers_says_is_as_before_afterwards():
    before = transformers.logging.get_verbosity()
    hf.build(**GPT2)
    assert transformers.logging.get_verbosity() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"config": "GPT2Confg"},
            "model.config is 'GPT2Confg', neither a config class of transformers nor a folder; did you mean "
            "GPT2Config\\? expected one such as GPT2Config or path/to/folder",
        ),
        ({"config": "GPT2Model"}, "model.config is 'GPT2Model', neither a config class .*"),
        ({"config": "no/folder"}, "model.config is 'no/folder', neither a config class .*"),
        ({"config": "empty"}, "model.config names the folder empty, which has no saved model: ValueError: .*"),
        ({**GPT2, "n_leyer": 3}, "GPT2Config has no option n_leyer; did you mean n_layer\\?"),
        ({**GPT2, "xyzzy": 3}, "GPT2Config has no option xyzzy; expected one of .*, n_layer, .*"),
        ({**GPT2, "n_layer": "x"}, "GPT2Config cannot be made with these options: .*n_layer.*"),
        ({**GPT2, "n_head": 3}, "GPT2LMHeadModel cannot be made: ValueError: .*"),
        (
            {**GPT2, "head": "AutoModelForMaskedLM"},
            "GPT2Config has no head AutoModelForMaskedLM; expected one of AutoModelForCausalLM, .*, or the name of .*",
        ),
        ({**GPT2, "head": "BertForMaskedLM"}, "GPT2Config has no head BertForMaskedLM; expected one of .*"),
        ({"config": "ViTMAEConfig"}, "ViTMAEConfig has no usual head; expected model.head=…, one of AutoModelFor.*"),
        ({**GPT2, "head": "GPT2Model"}, "the forward of GPT2Model takes no labels, so it computes no loss; .*"),
        (
            {"config": "BertConfig", **SIZES, "head": "BertForPreTraining"},
            "BertForPreTraining returns prediction_logits, seq_relationship_logits, and no logits to make up labels .*",
        ),
        ({**GPT2, "sequence_length": 2000}, "model.sequence_length is 2000; this GPT2LMHeadModel has 1024 positions"),
        ({**GPT2, "num_examples": 0}, "model.num_examples is 0; expected at least 1"),
        (
            {**GPT2, "head": "GPT2ForSequenceClassification"},
            "GPT2ForSequenceClassification failed on random samples of input_ids \\[16, 64\\]: ValueError: .*",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(folder, options, message):
    (folder / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"^{message}$") as error:
        hf.build(**options)
    assert "\n" not in str(error.value)


def test_an_option_without_its_plus_is_explained():
    with pytest.raises(ConfigError) as error:
        configs.load("train", ["model=hf", "model.config=GPT2Config", "model.n_layer=2"])
    assert str(error.value).endswith("model.num_examples; +model.n_layer=… passes an option that is not listed")


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ConfigError, match=r"^model=hf needs transformers \(.*\); expected pip install 'modelpar\[hf\]'$"
    ):
        hf.build("GPT2Config")
