"""Makes the files beside it: weights, inputs and outputs of the public implementations of Flamingo's parts.

It runs in an environment of its own, because the product does not depend on these packages:

    python -m venv peers
    peers/bin/pip install torch==2.13.0 safetensors numpy
    peers/bin/pip install --no-deps flamingo-pytorch==0.1.2 open_flamingo==2.0.1 einops==0.8.2 einops-exts==0.0.4
    peers/bin/python tests/golden/bridges/make.py

Each file holds a peer's state dict under ``weights.<name>``, its inputs under ``inputs.<name>`` and what it returned
under ``outputs.<name>``, in float32; its metadata (``about``, JSON) has versions and sizes. Of open_flamingo the one
file is loaded that holds these parts, because the package itself imports what they do not need.

Shape suffixes: B rows, M pictures, F frames, P patches, K media tokens, T text positions, D width, V picture width.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
from importlib.metadata import distribution, version

import flamingo_pytorch
import torch
from safetensors.torch import save_file

FOLDER = pathlib.Path(__file__).parent
RESAMPLER = {"dim": 8, "depth": 2, "dim_head": 3, "heads": 2, "num_latents": 3}
PUBLISHED_RESAMPLER = {"dim": 4, "depth": 2, "dim_head": 64, "heads": 2, "num_latents": 3}  # heads as published
BLOCK = {"dim": 8, "dim_head": 3, "heads": 2}
MEDIA_WIDTH = 6  # of open_flamingo's block; flamingo-pytorch's has the text's width

# Rows of a block: text before the first picture, several pictures, pictures in a row, and no picture at all.
LOCATIONS = [
    [0, 0, 1, 0, 0, 1, 0, 0, 1, 0],
    [1, 0, 0, 0, 1, 1, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
]


def open_flamingo_parts():
    """The module of open_flamingo that holds its resampler and its block."""
    path = distribution("open_flamingo").locate_file("open_flamingo/src/helpers.py")
    spec = importlib.util.spec_from_file_location("open_flamingo_helpers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def randomize(module):
    """Random values for every parameter: gates start at 0 and norms at 1, behind which differences would hide."""
    for name, parameter in module.named_parameters():
        is_scale = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=1.0 if is_scale else 0.0, std=0.4)
    for name in ("attn_gate", "ff_gate"):
        if hasattr(module, name):
            torch.nn.init.constant_(getattr(module, name), {"attn_gate": 0.7, "ff_gate": -0.4}[name])


def write(name, package, module, sizes, inputs, outputs):
    """Write one file of float32 tensors; the positions of pictures are uint8, 0 or 1."""
    tensors = {f"weights.{key}": tensor for key, tensor in module.state_dict().items()}
    tensors |= {f"inputs.{key}": tensor for key, tensor in inputs.items()}
    tensors |= {f"outputs.{key}": tensor for key, tensor in outputs.items()}
    about = {"package": f"{package}=={version(package)}", "torch": torch.__version__, "sizes": sizes}
    plain = {key: tensor.detach().contiguous().clone() for key, tensor in tensors.items()}
    save_file(plain, FOLDER / f"{name}.safetensors", metadata={"about": json.dumps(about)})


def make_resampler(name, package, kind, sizes, axes):
    """A resampler's output for two pictures in each of two rows, with the peer's own axes."""
    torch.manual_seed(0)
    module, x = kind(**sizes).eval(), torch.randn(*axes, sizes["dim"])
    randomize(module)
    if hasattr(module, "media_pos_emb"):
        torch.nn.init.zeros_(module.media_pos_emb)  # flamingo-pytorch's embedding by the number of a picture
    write(name, package, module, sizes, {"x": x}, {"media": module(x)})


def make_block(name, package, kind, media_width, sizes):
    """A block's output, where text sees the last picture before it alone."""
    torch.manual_seed(1)
    where_BT = torch.tensor(LOCATIONS, dtype=torch.bool)
    x_BTD, media_BMKV = torch.randn(*where_BT.shape, BLOCK["dim"]), torch.randn(len(LOCATIONS), 3, 2, media_width)
    module = kind(**sizes, only_attend_immediate_media=True).eval()
    randomize(module)
    inputs = {"x": x_BTD, "media": media_BMKV, "media_locations": where_BT.to(torch.uint8)}
    write(name, package, module, sizes, inputs, {"x": module(x_BTD, media_BMKV, media_locations=where_BT)})


@torch.no_grad()
def main():
    """Make all files."""
    torch.set_num_threads(1)
    open_flamingo = open_flamingo_parts()
    make_resampler(
        "flamingo_pytorch_resampler",
        "flamingo-pytorch",
        flamingo_pytorch.PerceiverResampler,
        RESAMPLER,
        axes=(2, 2, 5),  # B, M, P
    )
    make_resampler(
        "open_flamingo_resampler",
        "open_flamingo",
        open_flamingo.PerceiverResampler,
        PUBLISHED_RESAMPLER,
        axes=(2, 2, 1, 5),  # B, M, F, P
    )
    make_block(
        "flamingo_pytorch_block",
        "flamingo-pytorch",
        flamingo_pytorch.GatedCrossAttentionBlock,
        BLOCK["dim"],
        BLOCK,
    )
    make_block(
        "open_flamingo_block",
        "open_flamingo",
        open_flamingo.GatedCrossAttentionBlock,
        MEDIA_WIDTH,
        BLOCK | {"dim_visual": MEDIA_WIDTH},
    )


if __name__ == "__main__":
    main()
