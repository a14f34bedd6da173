"""What a LoRA step may ask of a GPU: how many launches, no waiting, no copied operand, no product that is cut into small ones.

Counted on the stand-in device, first with the readable primitives, then with the GPU's own kernels, which g++ compiles for the
CPU (host_cuda.py): so the whole step on the GPU's kernels is also held equal to NumPy's here. Seconds are never asserted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import fake_device
import host_cuda
import numpy as np
import pytest
from numpy.testing import assert_allclose

import minilora as ml
import minilora.backend.device as device_module
from minilora.backend import current_device, set_device
from minilora.backend.cupy_kernels import CupyKernels, strided
from minilora.backend.generic import Kernels
from minilora.training import AdamW

TARGETS = {"qkv_proj": ["qkv_proj"], "q_proj and v_proj": ["q_proj", "v_proj"], "all-linear": "all-linear"}

# Launches of a step, forward and backward, for each further layer, at dropout 0: readable primitives, the GPU's own kernels.
PER_LAYER = {
    ("gpt2", "qkv_proj"): (139, 45), ("gpt2", "q_proj and v_proj"): (152, 54), ("gpt2", "all-linear"): (169, 76),
    ("bert", "qkv_proj"): (149, 47), ("bert", "q_proj and v_proj"): (162, 56), ("bert", "all-linear"): (203, 96),
    ("llama", "qkv_proj"): (149, 54), ("llama", "q_proj and v_proj"): (162, 63), ("llama", "all-linear"): (213, 112),
}
BESIDES = (44, 12)      # embedding, last norm, head and loss
KINDS = ["readable", "own"]


class Counted(CupyKernels):
    """The GPU's kernels, with a count of the operands that they copy because cuBLAS cannot read them as they lie."""

    def _as_cublas_reads(self, a):
        fake_device._add(transposed_copies=strided(a) is None)
        return super()._as_cublas_reads(a)


@contextmanager
def installed(own: Kernels) -> Iterator[None]:
    """The stand-in device as the current one, with these primitives."""
    fake, before = device_module._devices[fake_device.FakeArray], current_device().name
    device_module._devices[fake_device.FakeArray] = replace(fake, kernels=own)
    set_device("fake")
    try:
        yield
    finally:
        device_module._devices[fake_device.FakeArray] = fake
        set_device(before)


@pytest.fixture(params=KINDS)
def kind(request):
    """The stand-in device with the readable primitives (0), or with the GPU's own kernels (1)."""
    if request.param == "own" and host_cuda.COMPILER is None:
        pytest.skip("needs g++ to run the kernels on the CPU")
    own = Kernels(fake_device.xp) if request.param == "readable" else Counted(fake_device.xp, host_cuda.HostDriver())
    with installed(own):
        yield KINDS.index(request.param)


def build(form, target, layers=2, **options):
    """A model with random adapters, and a batch for it: ids, targets, and what else the model takes."""
    cfg = getattr(ml.TransformerConfig, form)(vocab_size=19, d_model=8, n_layers=layers, n_heads=2, max_len=16, **options)
    model = ml.Transformer(cfg, seed=0)
    ml.add_adapter(model, ml.LoraConfig(r=2, target_modules=TARGETS[target], init_lora_weights=False))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 19, (2, 8))                # 16 rows: adapted weights are formed
    targets = rng.integers(0, 2 if cfg.n_labels else 19, 2 if cfg.head == "sequence" else (2, 8))
    inputs = {"attention_mask": np.array([[1] * 8, [1] * 5 + [0] * 3])} if form == "bert" else {}
    return model, ids, targets, inputs


def step(model, ids, targets, inputs):
    loss = ml.cross_entropy(model(ids, **inputs), targets)
    loss.backward()
    return loss


def counted(form, target, layers, **options):
    parts = build(form, target, layers, **options)
    with fake_device.count() as counts:
        step(*parts)
    return counts


@pytest.mark.parametrize(("form", "target"), PER_LAYER)
def test_launches_copies_and_waits_of_a_step(kind, form, target):
    one, two, three = (counted(form, target, layers) for layers in (1, 2, 3))
    per_layer = two.launches - one.launches
    assert three.launches - two.launches == per_layer <= PER_LAYER[form, target][kind]
    assert one.launches - per_layer <= BESIDES[kind]
    assert (three.syncs, three.transposed_copies, three.broadcast_products) == (0, 0, 0)


@pytest.mark.parametrize("target", TARGETS)
def test_a_mask_on_the_branch_costs_no_copies(kind, target):
    """Dropout on the branch's input, so the thin order is taken."""
    model, *rest = build("gpt2", target)
    for adapter in ml.lora.adapters_of(model).values():
        adapter.dropout = 0.1
    with fake_device.count() as counts:
        step(model.train(), *rest)
    assert (counts.syncs, counts.transposed_copies, counts.broadcast_products) == (0, 0, 0)


def test_a_step_of_adamw_is_a_launch_for_sixteen_parameters(kind):
    model, *rest = build("llama", "all-linear")
    params = [p for _, p in model.named_parameters(trainable=True)]
    optimizer = AdamW(params, lr=1e-3)
    step(model, *rest)
    with fake_device.count() as counts:
        optimizer.step()
    assert len(params) == 28 and counts.launches <= (14 * 28, 2)[kind] and counts.syncs == 0


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_a_sweep_step_cuts_no_product_into_small_ones(kind, form):
    """The same launches for two cells as for six, and none for a product of each."""
    model, *_ = build(form, "q_proj and v_proj")
    ml.delete_adapter(model, "default")
    found = []
    for seeds in ((0, 1), range(6)):
        with fake_device.count() as counts:
            ml.sweep(model, lambda i, rng: (rng.integers(0, 19, (2, 5)), rng.integers(0, 19, (2, 5))),
                     [ml.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])], seeds=seeds, lrs=(1e-3,),
                     train=ml.TrainConfig(steps=2, log_every=2, progress=False), chunk=6)
        assert (counts.transposed_copies, counts.broadcast_products) == (0, 0)
        found.append(counts.launches)
    assert found[1] - found[0] < 40 * 4                            # only what brings 4 more cells there and back


# The same numbers as on NumPy

@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("form", "target"), PER_LAYER)
def test_training_equals_numpys(kind, form, target, dtype):
    results = []
    for device in ("fake", "cpu"):
        parts = build(form, target)
        model = parts[0].to(device) if dtype == "float32" else as_float64(parts[0], device)
        params = dict(model.named_parameters(trainable=True))
        optimizer = AdamW(params.values(), lr=1e-2, weight_decay=0.1)
        losses = []
        for _ in range(3):
            losses.append(step(model, *parts[1:]).item())
            grads = {path: ml.to_host(p.grad) for path, p in params.items()}
            optimizer.step()
            optimizer.zero_grad()
        results.append((losses, grads, {path: ml.to_host(p) for path, p in params.items()}))
    (losses, grads, params), (want_losses, want_grads, want_params) = results
    tolerance = 1e-4 if dtype == "float32" else 1e-9
    assert_allclose(losses, want_losses, rtol=tolerance)
    for path in want_grads:
        assert grads[path].dtype == dtype
        assert_allclose(grads[path], want_grads[path], rtol=0, atol=tolerance * max(1.0, np.abs(want_grads[path]).max()))
        assert_allclose(params[path], want_params[path], rtol=0, atol=10 * tolerance)


def as_float64(model, device):
    """The same numbers in a model of float64."""
    twin = ml.Transformer(model.cfg, seed=0, dtype="float64").to(device)
    for name, config in model.adapter_configs.items():
        ml.add_adapter(twin, config, name)
    values = {path: ml.to_host(p) for path, p in model.named_parameters()}
    for path, p in twin.named_parameters():
        p.data[...] = ml.to_device(values[path].astype("float64"), device)
    return twin


def test_full_training_equals_numpys(kind):
    """Every parameter trains: the tables' gradients too."""
    for form in ("gpt2", "bert", "llama"):
        results = []
        for device in ("fake", "cpu"):
            model, ids, targets, inputs = build(form, "qkv_proj")
            ml.delete_adapter(model, "default")
            model.to(device).unfreeze()
            losses = [step(model, ids, targets, inputs).item()]
            results.append((losses, {path: ml.to_host(p.grad) for path, p in model.named_parameters()}))
        (losses, grads), (want_losses, want) = results
        assert_allclose(losses, want_losses, rtol=1e-5)
        for path in want:
            assert_allclose(grads[path], want[path], rtol=0, atol=1e-5, err_msg=path)


def test_sweep_and_generation_equal_numpys(kind):
    results = []
    for device in ("fake", "cpu"):
        set_device(device)
        model, ids, *_ = build("llama", "all-linear")
        text = ml.generate(model.eval(), ids, 4)
        ml.delete_adapter(model, "default")
        swept = ml.sweep(model, lambda i, rng: (rng.integers(0, 19, (2, 5)), rng.integers(0, 19, (2, 5))),
                         [ml.LoraConfig(r=r, target_modules=["q_proj", "v_proj"]) for r in (1, 3)], seeds=(0, 1),
                         lrs=(1e-2, 1e-3), train=ml.TrainConfig(steps=3, clip=0.5, weight_decay=0.1, progress=False))
        results.append((text, swept.losses))
    (text, losses), (want_text, want_losses) = results
    assert (text == want_text).all()
    assert_allclose(losses, want_losses, rtol=1e-5)


def test_analysis_equals_numpys(kind):
    results = []
    for device in ("fake", "cpu"):
        set_device(device)
        model, *_ = build("bert", "all-linear")
        results.append(ml.analyze(model).to_dict()["modules"])
    for name, row in results[1].items():
        assert_allclose(results[0][name]["singular_values"], row["singular_values"], rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(host_cuda.COMPILER is None, reason="needs g++ to run the kernels on the CPU")
def test_what_is_launched_where():
    """One launch for each norm, activation and masked softmax, forward and backward."""
    driver = host_cuda.HostDriver()
    with installed(CupyKernels(fake_device.xp, driver)):
        step(*build("gpt2", "qkv_proj", 3))
    launched = Counter(driver.launched)
    del launched["gemm"]
    assert launched == {"layer_norm": 7, "layer_norm_grad": 6, "gelu_tanh": 3, "attention_softmax": 3,     # nothing below the
                        "attention_softmax_grad": 3, "heads": 9, "cross_entropy": 1,              # first norm trains
                        "cross_entropy_grad": 1}
