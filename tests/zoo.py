"""Small random models of transformers and diffusers. Every function returns a model, a batch and a loss.

They are in train mode, and drop values out wherever their configuration has it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

SAMPLES, LENGTH, VOCABULARY = 4, 8, 48
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}


def ids(length=LENGTH):
    return torch.randint(3, VOCABULARY, (SAMPLES, length))


def language(model, config, **options):
    """Returns a model that predicts tokens and computes its own loss."""
    import transformers

    x = ids()
    return getattr(transformers, model)(getattr(transformers, config)(**options)), ({"input_ids": x, "labels": x}, None)


def decoder(model, config, **options):
    return language(model, config, **{**TINY, "vocab_size": VOCABULARY, **options})


def pictures(model, config, size, **options):
    """Returns a model that classifies pictures."""
    import transformers

    inputs = {"pixel_values": torch.randn(SAMPLES, 3, size, size), "labels": torch.randint(2, (SAMPLES,))}
    return getattr(transformers, model)(getattr(transformers, config)(**options)), (inputs, None)


def gpt2():
    return language(
        "GPT2LMHeadModel", "GPT2Config", n_layer=3, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=16
    )


def gpt_neox():
    drops = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
    return decoder("GPTNeoXForCausalLM", "GPTNeoXConfig", max_position_embeddings=16, **drops)


def llama():
    return decoder("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=1, attention_dropout=0.1)


def qwen2():
    return decoder("Qwen2ForCausalLM", "Qwen2Config", num_key_value_heads=1, attention_dropout=0.1)


def mistral():
    return decoder(
        "MistralForCausalLM", "MistralConfig", num_key_value_heads=1, attention_dropout=0.1, sliding_window=4
    )


def gemma():
    return decoder("GemmaForCausalLM", "GemmaConfig", num_key_value_heads=1, head_dim=8, attention_dropout=0.1)


def gemma2():
    return decoder("Gemma2ForCausalLM", "Gemma2Config", num_key_value_heads=1, head_dim=8, sliding_window=4)


def phi():
    return decoder("PhiForCausalLM", "PhiConfig", resid_pdrop=0.1, embd_pdrop=0.1, attention_dropout=0.1)


def mixtral():
    options = {"num_key_value_heads": 1, "num_local_experts": 4, "attention_dropout": 0.1, "output_router_logits": True}
    return decoder("MixtralForCausalLM", "MixtralConfig", **options)


def opt():
    options = {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 16}
    return decoder("OPTForCausalLM", "OPTConfig", **options)


def bloom():
    drops = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    return language(
        "BloomForCausalLM", "BloomConfig", n_layer=3, hidden_size=16, n_head=2, vocab_size=VOCABULARY, **drops
    )


def falcon():
    return decoder("FalconForCausalLM", "FalconConfig", hidden_dropout=0.1, attention_dropout=0.1)


def mamba():
    options = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 3, "vocab_size": VOCABULARY}
    return language("MambaForCausalLM", "MambaConfig", **options)


def bert():
    model, (inputs, _) = decoder("BertForMaskedLM", "BertConfig")
    return model, (inputs | {"attention_mask": half_padded()}, None)


def half_padded():
    """Returns an attention mask that is all ones for the first half of the samples only."""
    mask = torch.ones(SAMPLES, LENGTH, dtype=torch.long)
    mask[SAMPLES // 2 :, LENGTH // 2 :] = 0
    return mask


def roberta():
    return decoder("RobertaForMaskedLM", "RobertaConfig")


def electra():
    return decoder("ElectraForMaskedLM", "ElectraConfig", embedding_size=16)


def albert():
    drops = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return decoder("AlbertForMaskedLM", "AlbertConfig", embedding_size=8, **drops)


def distilbert():
    options = {"n_layers": 3, "dim": 16, "hidden_dim": 32, "n_heads": 2, "vocab_size": VOCABULARY}
    return language("DistilBertForMaskedLM", "DistilBertConfig", **options)


def deberta():
    options = {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_biased_input": False}
    return decoder("DebertaV2ForMaskedLM", "DebertaV2Config", **options)


def xlnet():
    options = {"d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 32, "vocab_size": VOCABULARY}
    return language("XLNetLMHeadModel", "XLNetConfig", **options)


def t5():
    options = {"num_layers": 2, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "decoder_start_token_id": 0}
    return language("T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, **options)


BOTH = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": VOCABULARY,
}  # fmt: skip


def bart():
    return language("BartForConditionalGeneration", "BartConfig", **BOTH, max_position_embeddings=16)


def pegasus():
    return language("PegasusForConditionalGeneration", "PegasusConfig", **BOTH, max_position_embeddings=16)


def whisper():
    import transformers

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    options = {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16, "dropout": 0.1, **special}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**BOTH, **options))
    return model, ({"input_features": torch.randn(SAMPLES, 8, 16), "labels": ids()}, None)


def wav2vec2():
    import transformers

    options = {"conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (4, 2), "num_conv_pos_embeddings": 4}
    more = {"num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0, "num_labels": 2}
    config = transformers.Wav2Vec2Config(**TINY, **options, **more, vocab_size=VOCABULARY, classifier_proj_size=8)
    model = transformers.Wav2Vec2ForSequenceClassification(config)
    return model, ({"input_values": torch.randn(SAMPLES, 160), "labels": torch.randint(2, (SAMPLES,))}, None)


def clip():
    import transformers

    text = {
        **TINY,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 16,
        "attention_dropout": 0.1,
        "eos_token_id": 2,
    }
    vision = {**TINY, "image_size": 8, "patch_size": 4, "attention_dropout": 0.1}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    return model, ({"input_ids": ids(), "pixel_values": torch.randn(SAMPLES, 3, 8, 8), "return_loss": True}, None)


def vit():
    drops = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return pictures("ViTForImageClassification", "ViTConfig", 16, **TINY, image_size=16, patch_size=8, **drops)


def dinov2():
    options = {**TINY, "image_size": 16, "patch_size": 8, "mlp_ratio": 2, "drop_path_rate": 0.2}
    return pictures("Dinov2ForImageClassification", "Dinov2Config", 16, **options)


def swin():
    options = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 2, "drop_path_rate": 0.2}
    return pictures("SwinForImageClassification", "SwinConfig", 16, image_size=16, patch_size=2, **options)


def segformer():
    import transformers

    options = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "num_labels": 3}
    more = {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    config = transformers.SegformerConfig(**options, **more, decoder_hidden_size=16)
    labels = torch.randint(3, (SAMPLES, 16, 16))
    model = transformers.SegformerForSemanticSegmentation(config)
    return model, ({"pixel_values": torch.randn(SAMPLES, 3, 16, 16), "labels": labels}, None)


def resnet():
    options = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}
    return pictures("ResNetForImageClassification", "ResNetConfig", 32, **options)


def convnext():
    options = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "drop_path_rate": 0.2}
    return pictures("ConvNextForImageClassification", "ConvNextConfig", 16, **options)


def unet2d():
    import diffusers

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    model = diffusers.UNet2DModel(**blocks, **sizes, attention_head_dim=8, dropout=0.1)
    noise = torch.randn(SAMPLES, 3, 8, 8)
    return model, ({"sample": noise, "timestep": torch.randint(0, 100, (SAMPLES,))}, noise)


def to_noise(output, targets):
    return F.mse_loss(output.sample, targets)


def with_loss(function):
    """Returns a model's function that also returns its loss: None, as it has its own, for all of transformers."""

    def build():
        model, batch = function()
        return model.train(), batch, to_noise if batch[1] is not None else None

    return build


ALL = {
    f.__name__: with_loss(f)
    for f in (
        gpt2, gpt_neox, llama, qwen2, mistral, gemma, gemma2, phi, mixtral, opt, bloom, falcon, mamba, bert, roberta,
        electra, albert, distilbert, deberta, xlnet, t5, bart, pegasus, whisper, wav2vec2, clip, vit, dinov2, swin,
        segformer, resnet, convnext, unet2d,
    )
}  # fmt: skip
