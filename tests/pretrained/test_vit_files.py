"""Files of Vision Transformers: wrapped, with a text tower, alike, or of another image size."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
import transformers
from networks import difference, random_images, random_pretrained, run, to_torch
from references.vit import randomize, timm_network
from references.vit_files import flax_arrays, newer_names
from torch.nn.functional import interpolate

from tljax.models import abstract_variables, build_model, normalize
from tljax.models.vit import VARIANTS
from tljax.pretrained import Pretrained, export, load_pretrained
from tljax.pretrained.configs import read_architecture, read_configs
from tljax.pretrained.formats import write_safetensors
from tljax.pretrained.identify import identify
from tljax.pretrained.rules import invert_rules
from tljax.pretrained.tables.layouts import LAYOUTS, layout_rules
from tljax.pretrained.unwrap import check
from tljax.runtime.errors import RequestError
from tljax.runtime.trees import flatten

Arrays = dict[str, np.ndarray]
MATRIX = np.ones((3, 3), np.float32)
CLIP, SIGLIP = "vit_base_patch32_clip_224", "vit_base_patch16_siglip_224"


@functools.cache
def file_of(name: str, layout: str, num_classes: int = 7) -> Arrays:
    """Return the keys and shapes of a file; the arrays take no memory."""
    leaves = flatten(abstract_variables(build_model(name, num_classes)))
    return {
        rule.key: np.broadcast_to(np.float32(0.5), rule.source_shape(leaves[rule.path].shape))
        for rule in layout_rules(name, layout)
    }


def without(arrays: Arrays, *parts: str) -> Arrays:
    return {key: x for key, x in arrays.items() if not any(part in key for part in parts)}


# --- what is dropped -----------------------------------------------------------------------------


def test_the_text_tower_of_clip_is_dropped_and_its_projection_is_the_head() -> None:
    tower = without(file_of(CLIP, "huggingface", 512), "visual_projection.bias")
    text = {"text_model.embeddings.token_embedding.weight": MATRIX, "logit_scale": MATRIX[0, 0]}
    identity = check({**text, **tower}, "net", CLIP)
    assert (identity.layout, identity.model.num_classes) == ("huggingface", 512)
    [note] = identity.notes("net")
    assert note == (
        f"net: ignored tensors that {CLIP} does not use: "
        "text_model.embeddings.token_embedding.weight, logit_scale"
    )
    np.testing.assert_array_equal(identity.arrays["visual_projection.bias"], np.zeros(512))


def test_a_tower_without_projection_is_a_backbone_with_the_class_token() -> None:
    tower = without(file_of(CLIP, "huggingface"), "visual_projection")
    bare = {key.removeprefix("vision_model."): array for key, array in tower.items()}
    for arrays in (tower, bare):
        identity = check(arrays, "net", CLIP)
        assert identity.model.stages == build_model(CLIP, 0).stages


def test_the_text_tower_of_siglip_is_dropped() -> None:
    tower = without(file_of(SIGLIP, "huggingface"), "classifier")
    identity = check({**tower, "text_model.head.weight": MATRIX}, "net", SIGLIP)
    assert identity.model.stages == build_model(SIGLIP, 0).stages
    assert "does not use: text_model.head.weight" in identity.notes("net")[0]


def test_the_decoder_of_mae_is_dropped() -> None:
    encoder = without(file_of("vit_tiny_patch16_224", "huggingface"), "classifier")
    decoder = {"decoder.mask_token": MATRIX, "decoder.decoder_pred.weight": MATRIX}
    identity = check({**decoder, **encoder}, "net")
    assert identity.model.stages == build_model("vit_tiny_patch16_224", 0).stages
    assert "decoder.mask_token, decoder.decoder_pred.weight" in identity.notes("net")[0]


def test_the_pooler_of_transformers_is_ignored() -> None:
    body = without(file_of("vit_tiny_patch16_224", "huggingface"), "classifier")
    bare = {key.removeprefix("vit."): array for key, array in body.items()}
    identity = check({**bare, "pooler.dense.weight": MATRIX}, "net")
    assert identity.model.num_classes == 0
    assert identity.notes("net") == ()


def test_a_tower_of_open_clip_is_unwrapped() -> None:
    trunk = without(file_of(SIGLIP, "timm"), "head.")
    wrapped = {f"visual.trunk.{key}": array for key, array in trunk.items()}
    identity = check({**wrapped, "text.transformer.weight": MATRIX}, "net")
    assert (identity.model.name, identity.prefix) == (SIGLIP, "visual.trunk.")
    assert "text.transformer.weight" in identity.notes("net")[0]


def test_the_text_tower_of_open_clip_is_dropped(tmp_path: Path) -> None:
    tower = file_of(CLIP, "open_clip", 512)
    assert "visual.proj.bias" in tower  # no file has it: it stands for zeros
    tower = without(tower, "visual.proj.bias")
    text = {
        "positional_embedding": MATRIX,
        "text_projection": MATRIX,
        "transformer.resblocks.0.ln_1.weight": MATRIX[0],
        "logit_scale": MATRIX[0, 0],
    }
    for prefix in ("", "module."):
        whole = {prefix + key: array for key, array in {**text, **tower}.items()}
        identity = check(whole, "net", CLIP)
        assert (identity.layout, identity.model.num_classes) == ("open_clip", 512)
        [note] = identity.notes("net")
        assert "does not use: " in note
        assert all(key in note for key in list(text)[:3])
    assert (identity.arrays["visual.proj.bias"] == 0).all()
    bare = {key.removeprefix("visual."): x for key, x in without(tower, "visual.proj").items()}
    identity = check(bare, "net", CLIP)
    assert (identity.layout, identity.model.num_classes) == ("open_clip", 0)
    write_safetensors(tmp_path / "net.safetensors", tower, {})
    with pytest.raises(RequestError, match=f"fits {CLIP} and vit_base_patch32_clip_quickgelu_224"):
        load_pretrained(tmp_path / "net.safetensors")


def stacked(arrays: Arrays) -> Arrays:
    """Return the arrays with their blocks stacked along a first axis."""
    blocks: dict[str, dict[int, np.ndarray]] = {}
    result = {}
    for key, array in arrays.items():
        if match := re.fullmatch(r"(.*encoderblock)_(\d+)(/.*)", key):
            blocks.setdefault(match[1] + match[3], {})[int(match[2])] = array
        else:
            result[key] = array
    return result | {key: np.stack([x[i] for i in range(len(x))]) for key, x in blocks.items()}


@pytest.mark.parametrize("stack", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_newer_file_of_big_vision_equals_what_timm_reads(stack: bool, tmp_path: Path) -> None:
    """It has 12 blocks, so that an order by text would differ."""
    name = "vit_tiny_patch16_224"
    network, written = timm_network(name, 7).eval(), timm_network(name, 7)
    randomize(written)
    state = {key: tensor.numpy() for key, tensor in written.state_dict().items()}
    arrays = newer_names(flax_arrays(state, VARIANTS[name].heads))
    arrays = {f"params/{key}": x for key, x in (stacked(arrays) if stack else arrays).items()}
    np.savez(tmp_path / "net.npz", **{**arrays, "opt/step": MATRIX[0]})
    with torch.no_grad():
        network.load_pretrained(str(tmp_path / "net.npz"))
    pretrained = load_pretrained(tmp_path / "net.npz", model=name)
    assert pretrained.card.layout == "vision_transformer"
    assert "does not use: opt/step" in pretrained.card.notes[0]
    exported = invert_rules(layout_rules(name, "timm"), pretrained.variables)
    for key, tensor in network.state_dict().items():
        np.testing.assert_array_equal(exported[key], tensor.numpy(), err_msg=key)


def test_a_file_of_siglip_holds_two_networks_with_the_same_tensors_and_a_text_tower() -> None:
    tower = without(file_of(SIGLIP, "big_vision"), "head/")
    for arrays in (tower, stacked(tower)):
        named = {f"params/img/{key}": array for key, array in arrays.items()}
        identity = check({**named, "params/txt/head/kernel": MATRIX, "params/t": MATRIX[0]}, "net")
        assert (identity.model.name, identity.layout) == (SIGLIP, "big_vision")
        assert identity.model.stages == build_model(SIGLIP, 0).stages
        assert "does not use: params/txt/head/kernel, params/t " in identity.notes("net")[0]
    assert LAYOUTS[SIGLIP]["big_vision"].twins(SIGLIP) == (f"hf_{SIGLIP}",)


def test_the_first_files_of_torchvision_have_other_keys() -> None:
    arrays = file_of("vit_base_patch16_224", "torchvision")
    old = {
        key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): array
        for key, array in arrays.items()
    }
    assert old.keys() != arrays.keys()
    identity = check(old, "net")
    assert (identity.model.name, identity.layout) == ("vit_base_patch16_224", "torchvision")
    assert (identity.model.preprocess.resize, identity.notes("net")) == (256, ())


def test_a_distilled_network_of_timm_is_refused() -> None:
    arrays = file_of("vit_tiny_patch16_224", "timm")
    others = {"dist_token": MATRIX, "head_dist.weight": MATRIX, "head_dist.bias": MATRIX[0]}
    with pytest.raises(RequestError, match=r"left over: dist_token, head_dist\.weight"):
        check({**arrays, **others}, "net")


def test_biases_of_dinov3_may_be_missing() -> None:
    arrays = file_of("vit_small_patch16_dinov3", "timm")
    few = without(arrays, "q_bias", "v_bias")
    for each, expected in ((arrays, 0.5), (few, 0)):
        identity = check(each, "net")
        assert identity.model.name == "vit_small_patch16_dinov3"
        assert (identity.arrays["blocks.3.attn.q_bias"] == expected).all()


# --- positions of another size -------------------------------------------------------------------


@pytest.mark.parametrize("side", [24, 7])
def test_positions_of_another_size_are_resized_with_a_note(side: int) -> None:
    rng = np.random.default_rng(0)
    positions = rng.standard_normal((1, 1 + side**2, 192)).astype(np.float32)
    arrays = {**file_of("vit_tiny_patch16_224", "timm"), "pos_embed": positions}
    identity = check(arrays, "net", "vit_tiny_patch16_224")
    resample: Any = oracles.load("timm.layers").resample_abs_pos_embed
    theirs = resample(torch.from_numpy(positions), [14, 14], num_prefix_tokens=1).numpy()
    # Both are compared with float64: in float32 coordinates up to `side` are rounded.
    grid = torch.from_numpy(positions[:, 1:]).double().reshape(1, side, side, 192)
    resized = interpolate(grid.movedim(-1, 1), (14, 14), mode="bicubic", antialias=True)
    expected = np.concatenate(
        [positions[:, :1], resized.movedim(1, -1).flatten(1, 2).numpy()], axis=1
    )
    for actual in (theirs, identity.arrays["pos_embed"]):
        assert difference(actual, expected) <= side * np.finfo(np.float32).eps
    [note] = identity.notes("net")
    assert note == (
        f"net: its {1 + side**2} positions are resized to the 197 of vit_tiny_patch16_224; export "
        "writes the resized ones"
    )


def test_a_file_of_a_known_size_is_not_resized() -> None:
    arrays = file_of("vit_tiny_patch16_384", "timm")
    identity = check(arrays, "net")
    assert (identity.model.name, identity.notes("net")) == ("vit_tiny_patch16_384", ())


def test_positions_that_fill_no_square_are_refused() -> None:
    arrays = file_of("vit_tiny_patch16_224", "timm")
    arrays = {**arrays, "pos_embed": np.broadcast_to(np.float32(0), (1, 200, 192))}
    with pytest.raises(RequestError, match=r"pos_embed is \[1, 200, 192\], not \[1, 197, 192\]"):
        check(arrays, "net")


# --- networks with the same tensors --------------------------------------------------------------


def test_a_file_alone_that_fits_two_networks_needs_a_choice(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "net.safetensors", file_of(CLIP, "timm"), {})
    expected = f"fits {CLIP} and vit_base_patch32_clip_quickgelu_224, which have the same tensors"
    with pytest.raises(RequestError, match=expected):
        load_pretrained(tmp_path / "net.safetensors")


def test_a_file_alone_that_fits_another_preprocessing_gives_a_note(tmp_path: Path) -> None:
    arrays = file_of("vit_tiny_patch16_224", "timm")
    write_safetensors(tmp_path / "net.safetensors", arrays, {})
    pretrained = load_pretrained(tmp_path / "net.safetensors")
    assert pretrained.model.name == "vit_tiny_patch16_224"
    [note] = pretrained.card.notes
    assert "deit_tiny_patch16_224 is the same network with another one" in note


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.ViTConfig(), "hf_vit_base_patch16_224"),
        (transformers.ViTConfig(layer_norm_eps=1e-6), "vit_base_patch16_224"),
        (transformers.ViTMAEConfig(), "hf_vit_base_patch16_224"),
        (transformers.CLIPVisionConfig(), "vit_base_patch32_clip_quickgelu_224"),
        (transformers.CLIPVisionConfig(hidden_act="gelu"), CLIP),
        (transformers.CLIPConfig(), "vit_base_patch32_clip_quickgelu_224"),
        (transformers.SiglipConfig(), f"hf_{SIGLIP}"),
        (transformers.SiglipVisionConfig(hidden_act="gelu"), SIGLIP),
    ],
)
def test_the_configuration_of_transformers_tells_them_apart(
    config: Any, expected: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    assert read_architecture(tmp_path) == expected
    read_configs(tmp_path, build_model(expected, 0))
    other = "vit_small_patch16_224" if "vit_base_patch16_224" in expected else SIGLIP
    if VARIANTS[other] != VARIANTS[expected]:
        with pytest.raises(RequestError, match=f"the tensors are those of {other}, but"):
            read_configs(tmp_path, build_model(other, 0))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("vit_base_patch32_clip_quickgelu_224", {"model_args": {"act_layer": "quick_gelu"}}),
        ("vit_small_patch14_dinov2", {"global_pool": "token", "model_args": {"img_size": 518}}),
        ("vit_base_patch16_siglip_224", {"global_pool": "map"}),
        ("vit_small_patch16_dinov3", {"global_pool": "avg"}),
    ],
)
def test_the_configurations_of_timm_are_read(
    name: str, values: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, **values}))
    assert read_architecture(tmp_path) == name


def test_another_pooling_is_refused(tmp_path: Path) -> None:
    config = {"architecture": "vit_tiny_patch16_224", "global_pool": "avg"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="global_pool is 'avg'; tljax supports only 'token'"):
        read_architecture(tmp_path)


def test_naflex_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    with pytest.raises(RequestError, match=r"images of any aspect ratio \(NaFlex\)"):
        read_architecture(tmp_path)


def test_an_image_processor_that_squeezes_gives_a_note(tmp_path: Path) -> None:
    processor: Any = transformers.ViTImageProcessor()
    processor.save_pretrained(tmp_path)
    transformers.ViTConfig().save_pretrained(tmp_path)
    description = read_configs(tmp_path, build_model("hf_vit_base_patch16_224", 0))
    assert description.preprocess is not None
    assert (description.preprocess.size, description.preprocess.resize) == (224, 224)
    assert any("squeezes images into a square" in note for note in description.notes)


# --- export --------------------------------------------------------------------------------------

CLASSES = [
    ("vit_tiny_patch16_224", "ViTForImageClassification"),
    *(
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in (
            ("hf_vit_tiny_patch16_224", "ViTForImageClassification"),
            ("hf_deit_tiny_distilled_patch16_224", "DeiTForImageClassification"),
            ("vit_small_patch14_dinov2_lc", "Dinov2ForImageClassification"),
            (
                "hf_vit_small_patch14_reg4_dinov2_lc",
                "Dinov2WithRegistersForImageClassification",
            ),
            ("vit_small_patch14_dinov2", "Dinov2Model"),
            (CLIP, "CLIPVisionModelWithProjection"),
            (SIGLIP, "SiglipVisionModel"),
            ("vit_small_patch16_dinov3", "DINOv3ViTModel"),
            ("vit_small_plus_patch16_dinov3", "DINOv3ViTModel"),
        )
    ),
]


@pytest.mark.parametrize(("name", "kind"), CLASSES)
def test_transformers_reads_an_exported_network(name: str, kind: str, tmp_path: Path) -> None:
    has_head = "Classification" in kind or "Projection" in kind
    model, variables, card = random_pretrained(name, 7 if has_head else 0)
    if "Projection" in kind:
        variables["params"]["head"]["bias"] = np.zeros(7, np.float32)
    export(tmp_path, Pretrained(model, variables, card), "huggingface")
    network = getattr(transformers, kind).from_pretrained(tmp_path).eval()
    size = model.preprocess.size
    images = random_images(1, size, size)
    with torch.no_grad():
        result = network(to_torch(normalize(images, model.preprocess)))
    expected = result.image_embeds if "image_embeds" in result else result.get("logits")
    expected = result.pooler_output if expected is None else expected
    assert difference(run(model, variables, images).logits, expected.numpy()) <= 1e-4
    loaded = load_pretrained(tmp_path)
    assert (loaded.model.name, loaded.model.num_classes) == (name, model.num_classes)


def test_timm_reads_an_exported_npz(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    model, variables, _ = pretrained = random_pretrained(name, 7)
    export(tmp_path / "net.npz", pretrained, "vision_transformer")
    network = oracles.load("timm").create_model(name, num_classes=7).eval()
    with torch.no_grad():
        network.load_pretrained(str(tmp_path / "net.npz"))
        images = random_images(1, 224, 224)
        expected = network(to_torch(normalize(images, model.preprocess))).numpy()
    assert difference(run(model, variables, images).logits, expected) <= 1e-4


def test_what_transformers_has_no_place_for_is_not_exported(tmp_path: Path) -> None:
    clip = random_pretrained(CLIP)
    with pytest.raises(RequestError, match=r"transformers has no visual_projection\.bias"):
        export(tmp_path, clip, "huggingface")
    with pytest.raises(RequestError, match=r"open_clip has no visual\.proj\.bias"):
        export(tmp_path / "net.pt", clip, "open_clip")
    with pytest.raises(RequestError, match="no classifier with the pooling of vit_small_patch16_d"):
        export(tmp_path, random_pretrained("vit_small_patch16_dinov3"), "huggingface")


def test_a_large_file_is_identified_by_its_first_stage() -> None:
    identity = identify(file_of("vit_small_patch16_384", "timm"))
    assert identity.model.name == "vit_small_patch16_384"
