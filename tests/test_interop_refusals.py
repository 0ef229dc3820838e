"""What is no encoder is refused in one sentence that says what it is, and never executed."""

import json
import pickle
import random
import subprocess
import sys

import pytest
import torch
from interop_models import encoder_of, masked_autoencoder
from safetensors.torch import save_file

from mae.errors import ConfigError
from mae.interop import assemble, huggingface, official
from mae.interop.load import MEAN, STD, open_encoder


class Harmful:
    """Opens a file for writing when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def wrong_files(folder):
    """(what is written, part of the answer)"""
    from torchvision.models import resnet18

    folder.mkdir(exist_ok=True)
    model = encoder_of(embed_dim=64, num_heads=1)
    weights = model.state_dict()
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    return {
        "resnet.pth": (resnet18().state_dict(), "looks like a ResNet"),
        "optimizer.pt": (optimizer, "optimizer's state"),
        "empty.pth": ({}, "no tensors"),
        "words.pth": ({"a": "b"}, "no tensors"),
        "list.pth": ([1, 2], "a list"),
        "missing.pth": ({k: v for k, v in weights.items() if k != "norm.bias"}, "lacks encoder.norm.bias"),
        "more.pth": (weights | {"blocks.0.strange": torch.zeros(1)}, "should not, encoder.blocks.0.strange"),
        "shape.pth": (weights | {"norm.bias": torch.zeros(3)}, "another shape encoder.norm.bias"),
        "half.pth": (weights | {"decoder_pos_embed": torch.zeros(1, 17, 16)}, "parts of a decoder"),
        "positions.pth": (weights | {"pos_embed": torch.zeros(1, 12, 64)}, "no grid of patches of 8 on a square image"),
        "heads.pth": (encoder_of().state_dict(), "how many attention heads"),
        "model.pth": (model, "run code of its own"),
        "harmful.pth": (Harmful(folder / "written"), "run code of its own"),
    }


def test_what_is_wrong_with_a_file_is_said_without_waiting_for_timm(tmp_path):
    contents = wrong_files(tmp_path / "x")
    for name in ("resnet.pth", "positions.pth", "heads.pth", "model.pth"):
        torch.save(contents[name][0], tmp_path / name)
        probe = (
            "import sys; from mae.commands import linear_probe; "
            f"code = linear_probe.main(['{tmp_path / name}']); assert 'timm' not in sys.modules; sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert contents[name][1] in done.stderr


def test_wrong_files_are_refused_in_a_sentence_that_says_what_they_are(tmp_path):
    for name, (content, answer) in wrong_files(tmp_path / "x").items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ConfigError, match=answer) as error:
            open_encoder(str(tmp_path / name))
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Harmful(tmp_path / "x" / "written")))
    (tmp_path / "cut.pth").write_bytes((tmp_path / "missing.pth").read_bytes()[:1000])
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    (tmp_path / "image.png").write_bytes(b"")
    for name, answer in (
        ("old.pth", "run code"),
        ("cut.pth", "damaged"),
        ("text.pth", "damaged"),
        ("cut.safetensors", "damaged"),
        ("image.png", "no checkpoint"),
    ):
        with pytest.raises(ConfigError, match=answer):
            open_encoder(str(tmp_path / name))
    assert not (tmp_path / "x" / "written").exists()


def test_wrong_words_and_folders_are_refused_within_seconds(tmp_path, monkeypatch):
    from mae.interop import hub

    monkeypatch.setattr(hub.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    (tmp_path / "bare").mkdir()
    for word, answer in (
        ("timm:vit_tiny_patch16_224", "HF_HUB_OFFLINE"),
        ("timm:vit_tinny_patch16_224", "did you mean timm:vit_tiny"),
        ("timm:resnet18", "not a VisionTransformer"),
        ("hf:nobody/no-such-model", "HF_HUB_OFFLINE"),
        ("hf:a/b/c", "no name on the Hugging Face hub"),
        (str(tmp_path / "other"), "model of type bert"),
        (str(tmp_path / "bare"), "neither a run folder nor"),
        (str(tmp_path / "nothing"), "there is no"),
    ):
        with pytest.raises(ConfigError, match=answer):
            open_encoder(word)


HEADS = {"num_heads": 4}
ARGUMENTS = (
    ({"image_size": 32, "mean": 0.5, "std": [0.2, 0.3, 0.1]}, {"image_size": (32, 32), "mean": (0.5,) * 3, "std": (0.2, 0.3, 0.1)}),
    ({"image_size": "32", "mean": [], "std": [0.0] * 3, "mask_ratio": 75, "norm_pix_loss": "yes", "layer_norm_eps": None}, {}),
    ({"image_size": [32, 32, 3], "mean": {"red": 0.5}, "std": float("nan"), "decoder_num_heads": [2]}, {}),
)


@pytest.mark.parametrize(("arguments", "read"), ARGUMENTS)
def test_what_a_training_says_beside_the_weights_is_read_where_it_is_of_the_right_kind(arguments, read, tmp_path):
    torch.save({"model": encoder_of().state_dict(), "args": HEADS | arguments}, tmp_path / "x.pth")
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in (HEADS | arguments).items()}
    save_file(encoder_of().state_dict(), tmp_path / "x.safetensors", texts)  # whose metadata are texts: "32" is a number there
    for file in ("x.pth", "x.safetensors"):
        opened = open_encoder(str(tmp_path / file))
        assert opened.overrides["num_heads"] == 4
        for name, usual in (("image_size", (32, 32)), ("mean", MEAN), ("std", STD)):
            assert getattr(opened, name) == read.get(name, usual)


@pytest.mark.parametrize("layout", [official, huggingface])
def test_no_damage_to_a_checkpoint_is_overlooked_or_ends_in_a_traceback(layout, tmp_path):
    draw, whole = random.Random(0), layout.from_ours(assemble.tensors_of(masked_autoencoder()))
    for _ in range(25):
        state = dict(whole)
        name = draw.choice(list(state))
        x = state.pop(name)
        damage = draw.randrange(4)
        if damage == 1:
            state[name[::-1]] = x
        elif damage == 2:
            state[name] = torch.zeros(draw.choice([(), (1,), (2, 3), (1, 2, 3)]))
        elif damage == 3:
            state[name] = x[..., :-1]
        torch.save({"model": state, "args": {"num_heads": 4, "decoder_num_heads": 2}}, tmp_path / "damaged.pth")
        with pytest.raises(ConfigError):
            open_encoder(str(tmp_path / "damaged.pth"))
