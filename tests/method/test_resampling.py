"""The resamplers: their published references, masks, sizes, and what parameter-partitioned training needs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from blip2_names import QFORMER_NAMES
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2QFormerConfig, Blip2QFormerModel
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection

from mmcot.errors import InputError
from mmcot.models.bridge import init_bridge_part
from mmcot.models.resampler import ResamplerShape
from mmcot.models.resampling import RESAMPLERS
from mmcot.vision.patches import PATCH_SCALE

SIZES = {"vision_dim": 7, "width": 16, "num_tokens": 3, "num_patches": 9, "depth": 3, "num_heads": 4}
GOLDEN = Path(__file__).parents[1] / "golden" / "bridges"  # its make.py says how the files were made
WITH_SHARES = ("pool", "perceiver", "qformer")


def make(kind, **sizes):
    torch.manual_seed(0)
    resampler = RESAMPLERS[kind](ResamplerShape(**SIZES | sizes)).eval()
    randomize(resampler)
    return resampler


def randomize(module):
    """Random values for biases and norms too, so that no difference hides behind a start with zeros or ones."""
    for name, parameter in module.named_parameters():
        is_scale = "norm" in name.lower() and name.endswith("weight")
        nn.init.normal_(parameter, mean=1.0 if is_scale else 0.0, std=0.3)


def pictures(patches=5, width=7, dtype=torch.float32):
    return torch.randn(2, 2, patches, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


def some_absent():
    mask = torch.ones(2, 2, 5, dtype=torch.bool)
    mask[0, 1, 2:] = mask[1, 0, 0] = False
    return mask


def one_without_patches():
    mask = some_absent()
    mask[1, 1] = False
    return mask


@pytest.fixture(params=RESAMPLERS)
def resampler(request):
    return make(request.param)


def copy_weights(ours, theirs, rename):
    """Copy all weights of ``theirs``; ``rename`` holds names of theirs, or parts between dots, and ours."""
    weights = {}
    for name, weight in theirs.state_dict().items():
        for old, new in rename.items():
            name = f".{name}.".replace(f".{old}.", f".{new}.").strip(".")
        weights[name] = weight
    ours.load_state_dict(weights)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# Published references, weights copied, float32. "Measured" is the largest difference that was seen.


def kosmos(attention="sdpa"):
    text = SimpleNamespace(embed_dim=16, attention_heads=4, attention_dropout=0.0, _attn_implementation=attention)
    config = SimpleNamespace(vision_config=SimpleNamespace(hidden_size=7), text_config=text, latent_query_num=3)
    theirs, ours = Kosmos2ImageToTextProjection(config).eval(), make("pool")
    randomize(theirs)
    copy_weights(ours, theirs, {"latent_query": "latents.weight", "x_attn": "attention"})
    return ours, theirs


def test_the_pool_is_that_of_kosmos_2():
    ours, theirs = kosmos()
    x = pictures()
    close(ours(x).flatten(0, 1), theirs(x.flatten(0, 1))[0])  # measured 0.0


def test_shares_of_the_pool_are_the_weights_of_kosmos_2_over_the_patches():
    ours, theirs = kosmos("eager")
    x = pictures()
    weights = theirs(x.flatten(0, 1))[1].mean(1)[..., :5]
    close(ours.shares(x).flatten(0, 1), weights / weights.sum(-1, keepdim=True))  # measured 0.0


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_perceiver_with_relu_is_that_of_idefics(qk_norm):
    config = SimpleNamespace(
        perceiver_config=SimpleNamespace(qk_layer_norms_perceiver=qk_norm), vision_config=SimpleNamespace(embed_dim=16)
    )
    theirs = IdeficsPerceiverResampler(config, embed_dim=16, depth=3, n_heads=4, head_dim=6, n_latents=3).eval()
    ours = make("perceiver", vision_dim=16, head_width=6, activation="relu", qk_norm=qk_norm)
    randomize(theirs)
    projections = {f"0.{name}": f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj")}
    norms = {
        "layer_norm": "norm",
        "0.context_layer_norm": "picture_norm",
        "0.latents_layer_norm": "latents_norm",
        "1.ln": "feed_forward_norm",
        "0.q_layer_norm": "attention.q_norm",
        "0.k_layer_norm": "attention.k_norm",
    }
    others = {
        "latents": "latents.weight",
        "0.output_proj": "attention.out_proj",
        "1.fc": "feed_forward.fc1",
        "1.c_proj": "feed_forward.fc2",
    }
    copy_weights(ours, theirs, projections | norms | others)
    x = pictures(width=16)
    close(ours(x).flatten(0, 1), theirs(x.flatten(0, 1)))  # measured 1.7e-6, of values to 4.1


@pytest.mark.parametrize("peer", ["flamingo_pytorch", "open_flamingo"])
def test_the_perceiver_is_that_of_the_ports_of_flamingo(peer):
    tensors = load_file(GOLDEN / f"{peer}_resampler.safetensors")
    weights = {name.removeprefix("weights."): w for name, w in tensors.items() if name.startswith("weights.")}
    assert not weights.pop("media_pos_emb", torch.zeros(1)).any()  # the one that is not ours: it was made with zeros
    x, width = tensors["inputs.x"], weights["latents"].shape[1]
    for name in [name for name in weights if "to_kv" in name]:
        keys, values = weights.pop(name).chunk(2)
        weights |= {name.replace("to_kv", "to_k"): keys, name.replace("to_kv", "to_v"): values}
    head_width = weights["layers.0.0.to_q.weight"].shape[0] // 2
    ours = make("perceiver", vision_dim=width, width=width, depth=2, num_heads=2, head_width=head_width)
    rename = {
        "layers": "blocks",
        "latents": "latents.weight",
        "0.norm_media": "picture_norm",
        "0.norm_latents": "latents_norm",
        "0.to_q": "attention.q_proj",
        "0.to_k": "attention.k_proj",
        "0.to_v": "attention.v_proj",
        "0.to_out": "attention.out_proj",
        "1.0.weight": "feed_forward_norm.weight",
        "1.0.bias": "feed_forward_norm.bias",
        "1.1.weight": "feed_forward.fc1.weight",
        "1.3.weight": "feed_forward.fc2.weight",
    }
    copy_weights(ours, SimpleNamespace(state_dict=lambda: weights), rename)
    close(ours(x.reshape(2, 2, 5, width)), tensors["outputs.media"])  # measured 1.9e-6, of values to 2.4


@pytest.mark.parametrize(
    ("activation", "function"),
    [("gelu", F.gelu), ("relu", torch.relu), ("squared_relu", lambda x: torch.relu(x) ** 2)],
)
def test_the_perceiver_is_the_formula_of_flamingo(activation, function):
    ours = make("perceiver", vision_dim=16, depth=2, activation=activation).double()
    x = pictures(width=16, dtype=torch.float64)[0, 0]
    latents = ours.latents.weight
    for block in ours.blocks:
        normed = block.latents_norm(latents)
        memory = torch.cat([block.picture_norm(x), normed])
        attention, read = block.attention, []
        for head in range(4):
            rows = slice(4 * head, 4 * head + 4)
            q = normed @ attention.q_proj.weight[rows].T
            k, v = memory @ attention.k_proj.weight[rows].T, memory @ attention.v_proj.weight[rows].T
            read.append((q @ k.T / 4**0.5).softmax(-1) @ v)
        latents = latents + torch.cat(read, dim=-1) @ attention.out_proj.weight.T
        inner = function(block.feed_forward_norm(latents) @ block.feed_forward.fc1.weight.T)
        latents = latents + inner @ block.feed_forward.fc2.weight.T
    torch.testing.assert_close(ours(x[None, None])[0, 0], ours.norm(latents), rtol=0, atol=1e-12)  # measured 1.6e-15


def blip2(**sizes):
    config = Blip2QFormerConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, encoder_hidden_size=7, **sizes
    )
    theirs, ours = Blip2QFormerModel(config).eval(), make("qformer")
    randomize(theirs)
    queries = nn.Module()
    queries.queries, queries.rest = ours.queries, theirs
    copy_weights(ours, queries, {"rest": ""} | QFORMER_NAMES)
    return ours, theirs


@pytest.mark.parametrize("mask", [None, some_absent()], ids=["all patches", "some absent"])
def test_the_qformer_is_that_of_blip_2(mask):
    ours, theirs = blip2()
    x = pictures()
    queries = ours.queries(3).expand(4, -1, -1)
    expected = theirs(
        queries,
        encoder_hidden_states=x.flatten(0, 1),
        encoder_attention_mask=None if mask is None else mask.flatten(0, 1).long(),
    )
    close(ours(x, mask).flatten(0, 1), expected.last_hidden_state)  # measured 0.0


def test_shares_of_the_qformer_are_the_last_cross_attention_of_blip_2():
    ours, theirs = blip2(attn_implementation="eager")
    x = pictures()
    expected = theirs(ours.queries(3).expand(4, -1, -1), encoder_hidden_states=x.flatten(0, 1), output_attentions=True)
    close(ours.shares(x).flatten(0, 1), expected.cross_attentions[-1].mean(1))  # measured 1.8e-7


def test_the_vit_is_a_transformer_of_torch_over_patches_and_tokens():
    ours = make("vit")
    layer = nn.TransformerEncoderLayer(16, 4, 64, 0.0, F.gelu, batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(16), enable_nested_tensor=False)
    for block, layer in zip(ours.blocks, theirs.layers, strict=True):
        parts = [block.attention.q_proj, block.attention.k_proj, block.attention.v_proj]
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": torch.cat([part.weight for part in parts]),
                "self_attn.in_proj_bias": torch.cat([part.bias for part in parts]),
            }
            | {f"self_attn.out_proj.{name}": p for name, p in block.attention.out_proj.named_parameters()}
            | {f"linear1.{name}": p for name, p in block.feed_forward.fc1.named_parameters()}
            | {f"linear2.{name}": p for name, p in block.feed_forward.fc2.named_parameters()}
            | {f"norm1.{name}": p for name, p in block.attention_norm.named_parameters()}
            | {f"norm2.{name}": p for name, p in block.feed_forward_norm.named_parameters()}
        )
    theirs.norm.load_state_dict(ours.norm.state_dict())
    x, mask = pictures().flatten(0, 1), some_absent().flatten(0, 1)
    states = torch.cat([ours.dense(x) + ours.positions.weight[:5], ours.tokens.weight.expand(4, -1, -1)], dim=1)
    expected = theirs(states, src_key_padding_mask=~F.pad(mask, (0, 3), value=True))[:, 5:]
    close(ours(pictures(), some_absent()).flatten(0, 1), expected)  # measured 0.0


def test_the_mean_is_a_sum_over_present_patches_reshaped():
    ours = make("mean").double()
    x = pictures(dtype=torch.float64)[0, 1]
    h = F.gelu(F.gelu(x @ ours.fc1.weight.T + ours.fc1.bias) @ ours.fc2.weight.T + ours.fc2.bias)
    expected = (ours.prefix.weight @ h[:2].sum(0) / 8 + ours.prefix.bias).view(3, 16)
    torch.testing.assert_close(ours(pictures(dtype=torch.float64), some_absent())[0, 1], expected)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_linear_projector_is_a_linear_layer_or_two_with_gelu(depth):
    ours = make("linear", depth=depth)
    expected = F.linear(pictures(), ours.layers[0].weight, ours.layers[0].bias)
    if depth == 2:
        expected = F.linear(F.gelu(expected), ours.layers[1].weight, ours.layers[1].bias)
    close(ours(pictures()), expected)


# Pictures and masks.


def test_media_have_the_tokens_that_were_said(resampler):
    for patches in (5, 9):
        assert resampler(pictures(patches)).shape == (2, 2, resampler.num_tokens_of(patches), 16)


def test_a_picture_alone_is_read_as_among_others(resampler):
    x, mask = pictures(), some_absent()
    alone = resampler(x[:1, 1:], mask[:1, 1:])
    close(resampler(x, mask)[:1, 1:], alone)


def test_a_mask_of_present_patches_is_as_none(resampler):
    x = pictures()
    close(resampler(x, torch.ones(2, 2, 5, dtype=torch.bool)), resampler(x))


@pytest.mark.parametrize("content", [1e3, float("inf"), float("nan")])
def test_what_absent_patches_hold_changes_nothing(resampler, content):
    x, mask = pictures(), some_absent()
    close(resampler(x.masked_fill(~mask[..., None], content), mask), resampler(x, mask))


def test_more_absent_patches_change_nothing(resampler):
    x, mask = pictures(), some_absent()
    media = resampler(F.pad(x, (0, 0, 0, 4), value=3.0), F.pad(mask, (0, 4), value=False))
    tokens = resampler.num_tokens_of(5)
    close(media[:, :, :tokens], resampler(x, mask))
    assert not media[:, :, tokens:].any()


def test_absent_patches_are_as_if_they_were_not_there(resampler):
    x, mask = pictures(), torch.tensor([True] * 3 + [False] * 2).expand(2, 2, -1)
    shorter = resampler(x[:, :, :3])
    close(resampler(x, mask)[:, :, : shorter.shape[2]], shorter)


def test_a_picture_without_patches_has_finite_media_and_gradients(resampler):
    x = pictures().requires_grad_()
    media = resampler(x, one_without_patches())
    media.square().sum().backward()
    assert media.isfinite().all() and x.grad.isfinite().all() and not x.grad[1, 1].any()
    assert all(parameter.grad.isfinite().all() for parameter in resampler.parameters())


def test_an_attention_to_nothing_gives_the_bias_of_its_output_layer():
    attention = make("qformer").blocks[0].picture_attention
    mask = torch.tensor([[[True] * 5], [[False] * 5]])
    read = attention(torch.randn(2, 3, 16), torch.randn(2, 5, 7), mask)
    assert torch.equal(read[1], attention.out_proj.bias.expand(3, -1)) and not torch.equal(read[0], read[1])


def test_every_parameter_learns(resampler):
    resampler(pictures(9)).square().sum().backward()
    for name, parameter in resampler.named_parameters():
        if not name.endswith("k_proj.bias"):  # the same for all keys: the softmax does not depend on it
            assert parameter.grad is not None and parameter.grad.any(), name


def test_it_computes_in_the_type_of_its_weights(resampler):
    expected = resampler(pictures(), one_without_patches())
    media = resampler.bfloat16()(pictures().half(), one_without_patches())
    assert media.dtype == torch.bfloat16
    error = (media.float() - expected).square().mean() / expected.square().mean()
    assert error < 0.05**2  # bfloat16 has 8 bits; measured 0.002 (mean) to 0.027 (perceiver), squared


def test_features_of_another_scale_are_divided_by_it(resampler):
    scaled = make_like(resampler, input_scale=PATCH_SCALE)
    close(scaled(PATCH_SCALE * pictures()), resampler(pictures()))


def make_like(resampler, **sizes):
    kind = next(name for name, cls in RESAMPLERS.items() if isinstance(resampler, cls))
    return make(kind, **sizes)


# Shares.


@pytest.mark.parametrize("kind", WITH_SHARES)
def test_shares_sum_to_one_over_present_patches_and_are_zero_elsewhere(kind):
    mask = one_without_patches()
    shares = make(kind).shares(pictures(), mask)
    assert shares.shape == (2, 2, 3, 5) and not shares[1, 1].any()
    assert not shares.masked_select(~mask[:, :, None].expand_as(shares)).any()
    torch.testing.assert_close(shares.sum(-1).flatten(0, 1)[:3], torch.ones(3, 3))


@pytest.mark.parametrize("kind", WITH_SHARES)
def test_shares_find_the_patch_that_was_made_to_be_seen(kind):
    resampler = make(kind, depth=1, num_heads=1, vision_dim=16)
    attention = {
        "pool": lambda: resampler.attention,
        "perceiver": lambda: resampler.blocks[0].attention,
        "qformer": lambda: resampler.blocks[0].picture_attention,
    }[kind]()
    x = pictures(width=16)
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        attention.q_proj.bias = nn.Parameter(torch.ones(16))
        attention.k_proj.weight.zero_()[:, 0] = 10.0
        if kind == "pool":
            resampler.dense.weight.copy_(torch.eye(16))
    assert (resampler.shares(x).argmax(-1) == expected_patch(resampler, kind, x)[..., None]).all()


def expected_patch(resampler, kind, x):
    return (resampler.blocks[0].picture_norm(x) if kind == "perceiver" else x)[..., 0].argmax(-1)


@pytest.mark.parametrize("kind", sorted(set(RESAMPLERS) - set(WITH_SHARES)))
def test_other_kinds_have_no_shares(kind):
    assert make(kind).shares(pictures()) is None


# Sizes.


def test_operations_are_those_of_torchs_counter(resampler):
    x = pictures()[:1, :1]
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        resampler(x)
    assert resampler.forward_flops(5) == counter.get_total_flops()


def count(kind, **sizes):
    with torch.device("meta"):
        resampler = RESAMPLERS[kind](ResamplerShape(num_patches=257, **sizes))
    return sum(parameter.numel() for parameter in resampler.parameters())


def test_the_size_of_flamingos_resampler():
    """Flamingo's (arXiv:2204.14198): 6 layers of width 1536 and 16 heads of 128, 64 latents.

    A layer has q, k, v, o, two matrices of the feed-forward, and weights and biases of three norms. The published
    number is 194 M, 2.7% more; the difference is not explained by these equations.
    """
    width, inner, depth = 1536, 16 * 128, 6
    layer = 4 * width * inner + 8 * width**2 + 6 * width
    expected = depth * layer + 64 * width + 2 * width
    sizes = {"vision_dim": width, "width": width, "num_tokens": 64, "depth": depth, "num_heads": 16, "head_width": 128}
    assert count("perceiver", **sizes) == expected == 188_900_352


def test_the_size_of_blip_2s_queries_alone():
    """BLIP-2's (arXiv:2301.12597): 12 layers of width 768, 32 queries, features of width 1408.

    As many as in transformers' Q-Former of that size without text, and the queries. With text feed-forwards and
    embeddings of words and positions it would be 185.7 M.
    """
    width, depth, vision_dim = 768, 12, 1408
    norm, square = 2 * width, width * (width + 1)
    layer = 4 * square + norm + width * 4 * width + 4 * width + 4 * width * width + width + norm
    cross = 2 * square + 2 * width * (vision_dim + 1) + norm
    expected = depth * layer + depth // 2 * cross + norm + 32 * width
    sizes = {"vision_dim": vision_dim, "width": width, "num_tokens": 32, "depth": depth, "num_heads": 12}
    with torch.device("meta"):
        theirs = Blip2QFormerModel(Blip2QFormerConfig())
    assert count("qformer", **sizes) == expected == 105_162_240
    assert expected == sum(parameter.numel() for parameter in theirs.parameters()) + 32 * width


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_tokens": 0}, "num_tokens of a resampler is 0; expected more than 0"),
        ({"input_scale": float("nan")}, "input_scale of a resampler is nan"),
        ({"activation": "swish"}, "activation 'swish' is unknown; expected one of gelu, relu, squared_relu"),
        ({"num_heads": 5}, r"width \(16\) must be a multiple of num_heads \(5\); try 20"),
    ],
)
def test_unusable_sizes_are_refused_with_a_remedy(sizes, message):
    with pytest.raises(InputError, match=message):
        make("perceiver", **sizes)


def test_more_patches_than_positions_are_refused():
    with pytest.raises(InputError, match="a picture has 10 patches, this resampler has positions for 9"):
        make("vit")(pictures(10))


# Parameter-partitioned training.


def test_weights_are_needed_only_while_their_module_is_called(resampler):
    """ZeRO-3 gathers a module's own weights when it is called; here they are taken away at all other times."""
    x, mask = pictures(), some_absent()
    expected = resampler(x, mask), resampler.shares(x, mask)
    weights = {name: parameter.data for name, parameter in resampler.named_parameters()}

    def give(name, module):
        def hook(*_):
            for own, parameter in module.named_parameters(recurse=False):
                parameter.data = weights[f"{name}.{own}"]

        return hook

    def take(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    for name, module in resampler.named_modules():
        take(module)
        module.register_forward_pre_hook(give(name, module))
        module.register_forward_hook(take)
    with torch.no_grad():
        close(resampler(x, mask), expected[0])
        if expected[1] is not None:
            close(resampler.shares(x, mask), expected[1])
    assert all(parameter.numel() == 0 for parameter in resampler.parameters())


def test_it_starts_as_every_bridge_without_reading_the_shapes_of_weights(resampler):
    shapes = {name: parameter.shape for name, parameter in resampler.named_parameters()}
    for parameter in resampler.parameters():
        parameter.data = parameter.data.flatten()  # partitioned weights have no shape
    for module in resampler.modules():
        init_bridge_part(module, 1.0)
    for name, parameter in resampler.named_parameters():
        parameter.data = parameter.data.view(shapes[name])
    media = resampler(pictures())
    assert media.isfinite().all() and 0.05 < media.std() < 3
