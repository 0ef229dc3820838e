"""The formulas say what torch counts, keeps, sends and prints."""

import gc
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from mae import config
from mae.methods.build import build
from mae.nets.vit import choose_attention
from mae.training import blocks, estimate, optim, scaling
from mae.training.arithmetic import shape_of
from mae.training.estimate import DEVICES, Layout

ROOT = Path(__file__).parents[1]
SMALL = ["configs/data/shapes.yaml", "train.steps=1", "optim.name=adamw"]
SMALL += ["encoder.embed_dim=96", "encoder.num_heads=3", "encoder.patch_size=4"]


def method(*words, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):
        return build(config.load([*SMALL, *words]))


BASE = ["encoder.name=vit_base_patch16_224", "data.image_size=224", "encoder.embed_dim=768", "encoder.num_heads=12"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mae", [*BASE, "encoder.patch_size=16", "encoder.depth=12"]),
        ("mae", ["encoder.depth=3", "method.mask_ratio=0.5", "method.predict_share=0.5"]),
        ("crossmae", ["encoder.depth=2", "encoder.reg_tokens=4", "encoder.patch_size=8", "encoder.mlp_ratio=3", "method.decoder_depth=2"]),
        ("crossmae", ["encoder.depth=1", "method.mask_ratio=0.9"]),
    ],
    ids=["base", "small", "cross with registers", "cross"],
)
def test_parameters_are_exact_and_flops_are_what_torch_counts(name, words):
    module = method(f"configs/methods/{name}.yaml", *words, device="meta")
    choose_attention(module, torch.device("cpu"))
    shape = shape_of(module)
    assert shape.parameters == sum(p.numel() for p in module.parameters())
    assert shape.trained == sum(p.numel() for p in module.parameters() if p.requires_grad)
    size = module.encoder.patch_embed.img_size
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), counter:
        module(torch.empty(4, 3, *size), keys=torch.arange(4)).loss.backward()
    assert 4 * shape.flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("name", ["mae", "crossmae"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")  # these look on, and move nothing
def test_activations_are_what_the_backward_pass_keeps(name, half, fused):
    module = method(f"configs/methods/{name}.yaml", "encoder.depth=2")
    if not fused:
        choose_attention(module, torch.device("cpu"))
    shape, images = shape_of(module), 8
    copies = 2 * shape.matrices if half else 0
    kept = saved_bytes(module, images, half) - copies
    assert kept == pytest.approx(images * shape.activations(half=half, fused=fused), rel=0.03)
    lean = method(f"configs/methods/{name}.yaml", "encoder.depth=2")
    if not fused:
        choose_attention(lean, torch.device("cpu"))
    blocks.recompute(lean, "selective")
    sizes = (shape.encoder, shape.known, 0), (shape.decoder, shape.decoded, shape.known)
    largest = max(s.kept(*tokens, half=half, fused=fused) - s.produced(*tokens, half=half, fused=fused) for s, *tokens in sizes)
    expected = images * (shape.activations(half=half, fused=fused, recompute="selective") - largest)  # nothing is made anew yet
    outside = 2 * shape.decoder.width * (shape.encoder.width + shape.values) if half else 0  # copies of weights that no block holds
    assert saved_bytes(lean, images, half) == pytest.approx(expected + outside, rel=0.03)
    blocks.recompute(module, True)
    block = 2 * max(shape.encoder.block, shape.decoder.block) if half else 0
    again = saved_bytes(module, images, half)  # before the backward pass, whose largest block comes on top
    assert again < images * shape.activations(half=half, fused=fused, recompute=True) + block + copies


def saved_bytes(module, images, half):
    """Bytes that autograd and recomputation hold after a forward pass, without the parameters; a storage counts once."""
    pixels, keys, held = torch.randn(images, 3, 32, 32), torch.arange(images), {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    gc.collect()  # so that no place in memory is taken twice
    before = {t.untyped_storage().data_ptr() for t in tensors()}  # with the parameters
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=half):
        output = module(pixels, keys=keys)
    held |= {t.untyped_storage().data_ptr(): t for t in tensors()}
    del output
    return sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in before)


def tensors():
    """All that Python knows, but for the states of generators; subclasses, which have no memory of their own, are other tests'."""
    plain = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return [x for x in plain if x.device.type == "cpu" and x.dtype != torch.uint8]


def test_the_state_and_what_is_sent_are_exact(tmp_path):
    cfg = config.load(SMALL)
    module = method("encoder.depth=2")
    shape, sent = shape_of(module), []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True)
        wrapped.register_comm_hook(None, lambda _, bucket: count(bucket, sent))
        optimizer = optim.create(module, cfg.optim)
        wrapped(torch.randn(2, 3, 32, 32), keys=torch.arange(2)).loss.backward()
        optimizer.step()
    finally:
        dist.destroy_process_group()
    for ranks in (2, 8):
        assert estimate.traffic(shape, Layout(ranks, 1)) == 2 * (ranks - 1) / ranks * sum(sent)
    moments = [v for state in optimizer.state.values() for name, v in state.items() if name != "step"]
    state = [*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None), *moments]
    assert estimate.state_bytes(shape.parameters, trained=shape.trained) == sum(t.numel() * t.element_size() for t in state)


def count(bucket, sent):
    sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def test_estimates_move_the_way_they_must():
    shape, device = shape_of(method("encoder.depth=2", device="meta")), DEVICES["h100"]
    plain = Layout(64, 32)
    sharded, again = Layout(64, 32, sharded=True), Layout(64, 32, recompute=True)
    assert estimate.memory(shape, again) < estimate.memory(shape, plain)
    assert estimate.traffic(shape, sharded) == pytest.approx(1.5 * estimate.traffic(shape, plain), rel=0.05)  # ZeRO, section 7.2.2
    alone = estimate.seconds(shape, Layout(1, 32), device)
    assert alone < estimate.seconds(shape, plain, device)
    assert estimate.seconds(shape, again, device) > estimate.seconds(shape, plain, device)
    room = estimate.memory(shape, Layout(2, 64))
    assert estimate.layout_for(shape, 256, 2, room) == Layout(2, 64, accumulate=2)
    assert estimate.layout_for(shape, 256, 2, 1e3) is None
    with pytest.raises(ValueError, match="no masked autoencoder"):
        shape_of(method("configs/methods/ae.yaml", "encoder.depth=1", device="meta"))
    with pytest.raises(ValueError, match="no plain ViT"):
        shape_of(method("encoder.depth=1", "encoder.init_values=0.1", device="meta"))


def test_the_tables_of_the_docs_are_the_calculators():
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert scaling.tables() in page, "python -m mae.training.scaling prints what belongs into docs/scaling.md"
