"""A sweep against the same adapters trained one by one: K side by side must be K alone."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import fake_device
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from minilora.autograd import log_softmax
from minilora.backend import current_device, set_device, to_device, to_host
from minilora.lora import LoraConfig, adapters_of, add_adapter, delete_adapter, merge_adapter, set_adapter, unmerge_adapter
from minilora.methods import (
    AdaLoraConfig,
    GateProx,
    LoraFAConfig,
    RankAllocator,
    SoRAConfig,
    TensorTrainConfig,
    VeraConfig,
    loraplus_groups,
    quantise,
)
from minilora.nn import Transformer, TransformerConfig
from minilora.training import AdamW, TrainConfig, mean_loss, sweep, task_batches, train
from minilora.training.stacks import LoRAStack
from minilora.training.sweep import bytes_per_cell

VOCAB = 13
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def base_model(dtype: str = "float64", **fields: Any) -> Transformer:
    form = {"vocab_size": VOCAB, "d_model": 12, "n_layers": 2, "n_heads": 2, "d_ff": 20, "max_len": 16}
    model = Transformer(TransformerConfig.llama(**form | fields), seed=1, dtype=dtype)
    if model.head is not None:
        model.head.weight.data *= 25.0                             # a head that can tell tokens apart
    return model


def lora(r: int, **fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": r, "lora_alpha": 8, "target_modules": TARGETS} | fields)


def task_of(B: int, T: int) -> Any:
    """Repeatable batches of (B, T); some targets do not count."""
    def task(i: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        ids = rng.integers(0, VOCAB, (B, T))
        targets = (5 * ids + i) % VOCAB
        targets[rng.random((B, T)) < 0.3] = -100
        targets[:, 0] = 1
        return ids, targets
    return task


def quiet(**fields: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 5, "lr": 1e-2, "progress": False} | fields)


VALID = [task_of(2, 6)(i, np.random.default_rng([99, i])) for i in range(2)]


def assert_equals_alone(model, task, configs, seeds, lrs, config, result, evaluate=VALID, rtol=1e-10,
                        beside=lambda model: {}) -> None:
    """Every cell's losses, parameters and evaluation, against `train` on the adapter alone; beside(model): more for it."""
    cells = [(c, seed, lr) for c in configs for seed in seeds for lr in lrs]
    assert len(result.rows) == len(cells) and result.losses.shape == (config.steps, len(cells))
    for k, (adapter_config, seed, lr) in enumerate(cells):
        add_adapter(model, adapter_config, "alone", seed=seed)
        history = train(model, task_batches(task, seed), replace(config, lr=lr), evaluate=evaluate, **beside(model))
        row = result.rows[k]
        assert (row["cell"], row["rank"], row["seed"], row["lr"]) == (
            k, getattr(adapter_config, "init_r", adapter_config.r), seed, lr)
        assert_allclose(result.losses[:, k], history.loss, rtol=rtol)
        for path, adapter in adapters_of(model, "alone").items():
            found = result.adapter(k).parameters[path]
            for name, p in adapter.named_parameters():
                assert_allclose(found[name], to_host(p), rtol=rtol, atol=rtol, err_msg=f"cell {k}: {path}.{name}")
        assert row["train_loss"] == result.losses[-1, k] and not row["diverged"]
        assert row["eval_loss"] == pytest.approx(mean_loss(model, evaluate), rel=rtol)
        assert [(step, pytest.approx(value[k], rel=rtol)) for step, value in result.evals] == history.eval
        delete_adapter(model, "alone")


@pytest.mark.slow_on_the_stand_in
@pytest.mark.parametrize("B, T", [(3, 8), (1, 4)], ids=["weights formed", "thin products"])
def test_every_cell_equals_itself_alone(device, B, T):
    """Ranks 1, 2 and 5, two seeds, two rates, rsLoRA, warm-up, decay, clipping that binds for some: 20 steps to 1e-10."""
    model, task, steps = base_model(), task_of(B, T), 4 if device == "fake" else 20
    configs = [lora(1), lora(2, lora_alpha=16, alpha_pattern={"o_proj": 3}),
               lora(5, use_rslora=True, rank_pattern={"v_proj": 3})]
    config = quiet(steps=steps, warmup=3, schedule="cosine", weight_decay=0.1, clip=0.4, eval_every=8)
    result = sweep(model, task, configs, seeds=(0, 7), lrs=(2e-3, 1e-2), train=config, evaluate=VALID)
    assert_equals_alone(model, task, configs, (0, 7), (2e-3, 1e-2), config, result)


def test_accumulation_and_label_smoothing_as_alone(device):
    model, task, config = base_model(), task_of(2, 5), quiet(steps=3, accumulate=3, label_smoothing=0.1, clip=0.2)
    configs = [lora(2), lora(3)]
    result = sweep(model, task, configs, seeds=(1, 2), train=config, evaluate=VALID)
    assert_equals_alone(model, task, configs, (1, 2), (1e-2,), config, result)


@pytest.mark.parametrize("init", ["gaussian", False])
def test_other_starts_are_drawn_as_alone(init):
    model, task, config = base_model(), task_of(2, 5), quiet(steps=3)
    configs = [lora(2, init_lora_weights=init), lora(4, init_lora_weights=init)]
    result = sweep(model, task, configs, seeds=(3, 4), train=config, evaluate=VALID)
    assert_equals_alone(model, task, configs, (3, 4), (1e-2,), config, result)


@pytest.mark.slow_on_the_stand_in
@pytest.mark.parametrize("B, T", [(3, 8), (1, 4)], ids=["weights formed", "thin products"])
def test_starts_taken_from_the_weight_stand_side_by_side_as_alone(device, B, T):
    """PiSSA exact and randomised, MiLoRA, OLoRA and plain LoRA, of different ranks, in one run."""
    model, task = base_model(), task_of(B, T)
    config = quiet(steps=3 if device == "fake" else 10, warmup=2, weight_decay=0.1, clip=0.4)
    configs = [lora(2, init_lora_weights="pissa"), lora(4, init_lora_weights="pissa_niter_3"), lora(3),
               lora(1, init_lora_weights="milora", use_rslora=True), lora(5, init_lora_weights="olora", lora_alpha=2)]
    result = sweep(model, task, configs, seeds=(0, 3), lrs=(2e-3,), train=config, evaluate=VALID)
    assert_equals_alone(model, task, configs, (0, 3), (2e-3,), config, result)
    result.install(model, 0)
    assert mean_loss(model, VALID) == pytest.approx(result.rows[0]["eval_loss"], rel=1e-10)


def test_rows_beyond_a_rank_stay_zero_with_starts_from_the_weight(monkeypatch):
    stacks, plain = [], LoRAStack.unstacked
    monkeypatch.setattr(LoRAStack, "unstacked", lambda self: stacks.append(self) or plain(self))
    sweep(base_model("float32"), task_of(2, 6), [lora(1, init_lora_weights="pissa"), lora(4)], train=quiet(weight_decay=0.1))
    assert len(stacks) == 2 * len(TARGETS)
    for stack in stacks:
        assert not stack.lora_A.data[0, 1:].any() and not stack.lora_B.data[0, :, 1:].any() and not stack.A0[1].any()
        assert stack.lora_A.data[1].all() and stack.A0[0, 0].all()


def test_lora_fa_as_alone(device):
    """A stays as it was drawn, to the bit, and only B counts as trained."""
    model, task, config = base_model(), task_of(2, 5), quiet(steps=4, clip=0.3, weight_decay=0.1)
    configs = [LoraFAConfig(r=r, lora_alpha=8, target_modules=TARGETS) for r in (2, 3)]
    result = sweep(model, task, configs, seeds=(0, 1), train=config, evaluate=VALID)
    assert_equals_alone(model, task, configs, (0, 1), (1e-2,), config, result)
    add_adapter(model, configs[1], "again", seed=1)
    for path, adapter in adapters_of(model, "again").items():
        assert_array_equal(result.adapter(3).parameters[path]["lora_A"], to_host(adapter.lora_A))
    assert result.rows[3]["parameters"] == sum(a.lora_B.size for a in adapters_of(model, "again").values())


@pytest.mark.slow_on_the_stand_in
@pytest.mark.parametrize("B, T", [(3, 8), (1, 4)], ids=["weights formed", "thin products"])
@pytest.mark.parametrize("configs", [
    [VeraConfig(r=2, target_modules=TARGETS), VeraConfig(r=7, d_initial=0.5, projection_prng_key=3, target_modules=TARGETS)],
    [TensorTrainConfig(r=r, order=2, target_modules=TARGETS) for r in (1, 4)],
], ids=["VeRA", "tensor train"])
def test_other_products_as_alone(device, configs, B, T):
    """Of different ranks, and VeRA with another frozen pair in each cell."""
    model, task = base_model(), task_of(B, T)
    config = quiet(steps=3 if device == "fake" else 10, warmup=2, weight_decay=0.1, clip=0.4)
    result = sweep(model, task, configs, seeds=(0, 3), lrs=(2e-2,), train=config, evaluate=VALID)
    assert_equals_alone(model, task, configs, (0, 3), (2e-2,), config, result)
    result.install(model, 3)
    assert mean_loss(model, VALID) == pytest.approx(result.rows[3]["eval_loss"], rel=1e-10)


@pytest.mark.slow_on_the_stand_in
def test_sora_as_alone(device):
    """Each cell's gates close by its own rate and λ: some are shut at the end, and not all."""
    model, task, config = base_model(), task_of(2, 5), quiet(steps=8, clip=0.3, warmup=2)
    configs = [SoRAConfig(r=r, lora_alpha=8, sparse_lambda=weight, target_modules=TARGETS) for r, weight in ((2, 1.), (5, 8.))]
    result = sweep(model, task, configs, seeds=(0, 1), lrs=(5e-3, 2e-2), train=config, evaluate=VALID)
    assert_equals_alone(model, task, configs, (0, 1), (5e-3, 2e-2), config, result,
                        beside=lambda model: {"callback": GateProx(model, "alone").callback})
    shut = [sum(int((own["gate"] == 0).sum()) for own in result.adapter(k).parameters.values()) for k in range(8)]
    assert shut[6] > 0 and shut[7] < 5 * 2 * len(TARGETS)


@pytest.mark.slow_on_the_stand_in
@pytest.mark.parametrize("kinds", [("peft", "peft"), ("paper", "paper"), ("paper", "peft")], ids="-".join)
def test_adalora_as_alone(device, kinds):
    """Each cell has its own budget over all its modules, and its own penalty; the budgets are met exactly. Targets that do not
    count, smoothing and accumulation are as in any other run."""
    if device == "fake" and kinds[0] == kinds[1]:
        pytest.skip("on the stand-in both kinds in one run are enough")
    model, task = base_model(), task_of(2, 5)
    config = quiet(steps=9, clip=0.5, warmup=2, label_smoothing=0.1, accumulate=2)
    configs = [AdaLoraConfig(init_r=init_r, target_r=target_r, total_step=9, tinit=2, tfinal=2, deltaT=2, orth_reg=orth_reg,
                             orth_reg_weight=weight, target_modules=TARGETS)
               for (init_r, target_r, weight), orth_reg in zip(((3, 1, 0.5), (5, 2, 0.1)), kinds)]
    result = sweep(model, task, configs, seeds=(0, 1), train=config, evaluate=VALID)
    allocators: list[Any] = []

    def beside(model):
        allocators.append(RankAllocator(model, "alone"))
        return {"penalty": allocators[-1].penalty, "callback": allocators[-1].callback}

    assert_equals_alone(model, task, configs, (0, 1), (1e-2,), config, result, beside=beside)
    for k, allocator in enumerate(allocators):
        ranks = {path: int((own["lora_E"] != 0).sum()) for path, own in result.adapter(k).parameters.items()}
        assert ranks == allocator.ranks[-1][1] and sum(ranks.values()) == configs[k // 2].target_r * 2 * len(TARGETS)


def test_lora_plus_as_alone(device):
    model, task, config = base_model(), task_of(2, 5), quiet(steps=4, clip=0.3, weight_decay=0.1, warmup=2)
    result = sweep(model, task, [lora(2), lora(3)], seeds=(0, 1), lrs=(1e-3, 4e-3), train=config, loraplus_lr_ratio=8.0)
    for k, (r, seed, lr) in enumerate((r, seed, lr) for r in (2, 3) for seed in (0, 1) for lr in (1e-3, 4e-3)):
        add_adapter(model, lora(r), "alone", seed=seed)
        optimizer = AdamW(loraplus_groups(model, lr, 8.0, loraplus_weight_decay=0.1))
        history = train(model, task_batches(task, seed), config, optimizer=optimizer)
        assert_allclose(result.losses[:, k], history.loss, rtol=1e-10)
        for path, adapter in adapters_of(model, "alone").items():
            for name, p in adapter.named_parameters():
                assert_allclose(result.adapter(k).parameters[path][name], to_host(p), rtol=1e-9, atol=1e-12)
        delete_adapter(model, "alone")


def test_lora_plus_with_a_trained_classifier_as_alone():
    """Its bias is in B's group and does not decay, as in `loraplus_groups`."""
    cfg = TransformerConfig.bert(vocab_size=VOCAB, d_model=12, n_layers=1, n_heads=2, max_len=16, n_labels=3)
    model, config = Transformer(cfg, seed=2, dtype="float64"), quiet(steps=4, weight_decay=0.1)

    def task(i, rng):
        ids = rng.integers(0, VOCAB, (4, 6))
        return ids, ids[:, 0] % 3

    result = sweep(model, task, [lora(2)], lrs=(1e-3,), train=config, loraplus_lr_ratio=8.0)
    add_adapter(model, lora(2))
    optimizer = AdamW(loraplus_groups(model, 1e-3, 8.0, loraplus_weight_decay=0.1))
    history = train(model, task_batches(task, 0), config, optimizer=optimizer)
    assert_allclose(result.losses[:, 0], history.loss, rtol=1e-10)
    for path, adapter in adapters_of(model).items():
        for name, p in adapter.named_parameters():
            assert_allclose(result.adapter(0).parameters[path][name], to_host(p), rtol=1e-9, atol=1e-12)


def test_a_base_of_4_bits_needs_no_chunk():
    model = quantise(base_model(d_model=64, d_ff=64, n_heads=4))
    for targets in ["qkv_proj"], ["q_proj", "up_proj"]:
        configs, config = [lora(2, target_modules=targets), lora(3, target_modules=targets)], quiet(steps=2)
        result = sweep(model, task_of(2, 5), configs, train=config, evaluate=VALID)
        assert_equals_alone(model, task_of(2, 5), configs, (0,), (1e-2,), config, result)


@pytest.mark.parametrize("make", [TransformerConfig.gpt2, TransformerConfig.bert])
def test_packed_targets_and_trained_classifiers_as_alone(device, make):
    """qkv_proj as one target; a classifier that trains whole beside every adapter; attention masks in dict batches."""
    cfg = make(vocab_size=VOCAB, d_model=12, n_layers=1, n_heads=2, max_len=16, n_labels=3)
    model = Transformer(cfg, seed=2, dtype="float64")

    def task(i, rng):
        ids = rng.integers(0, VOCAB, (4, 6))
        mask = (np.arange(6) < rng.integers(2, 7, 4)[:, None]).astype(np.int64)
        return {"ids": ids, "targets": ids[:, 0] % 3, "attention_mask": mask}

    configs = [LoraConfig(r=r, target_modules=["qkv_proj", "up_proj"]) for r in (1, 4)]
    config, valid = quiet(clip=1.0), [task(0, np.random.default_rng(5))]
    result = sweep(model, task, configs, seeds=(0, 1), lrs=(2e-2,), train=config, evaluate=valid)
    assert "classifier" in result.adapter(0).parameters
    assert_equals_alone(model, task, configs, (0, 1), (2e-2,), config, result, evaluate=valid)


def test_rows_beyond_a_rank_stay_exactly_zero(device, monkeypatch):
    stacks = []
    plain = LoRAStack.unstacked
    monkeypatch.setattr(LoRAStack, "unstacked", lambda self: stacks.append(self) or plain(self))
    sweep(base_model("float32"), task_of(2, 6), [lora(1), lora(3), lora(6)], train=quiet(weight_decay=0.1, clip=0.1))
    assert len(stacks) == 2 * len(TARGETS)
    for stack in stacks:
        A, B = to_host(stack.lora_A), to_host(stack.lora_B)
        assert A.shape[1] == B.shape[2] == 6
        for k, r in enumerate((1, 3, 6)):
            assert not A[k, r:].any() and not B[k, :, r:].any()
            assert A[k, :r].all() and B[k, :, :r].all()


@pytest.mark.slow_on_the_stand_in
def test_the_result_does_not_depend_on_the_chunks(device):
    model, task, configs = base_model(), task_of(2, 6), [lora(5), lora(1), lora(2)]
    found = [sweep(model, task, configs, seeds=(0, 3), train=quiet(steps=3, clip=0.3, eval_every=2), evaluate=VALID, **how)
             for how in ({}, {"chunk": 4}, {"memory": 1})]
    for other in found[1:]:
        assert_allclose(other.losses, found[0].losses, rtol=1e-12)
        for (step, a), (other_step, b) in zip(found[0].evals, other.evals, strict=True):
            assert step == other_step
            assert_allclose(a, b, rtol=1e-12)
        assert [row["rank"] for row in other.rows] == [5, 5, 1, 1, 2, 2]
        for k in range(6):
            for path, own in found[0].adapter(k).parameters.items():
                assert own["lora_A"].shape == (other.rows[k]["rank"], own["lora_A"].shape[1])
                for name, value in own.items():
                    assert_allclose(other.adapter(k).parameters[path][name], value, rtol=1e-10, atol=1e-12)


def test_the_task_is_asked_once_for_each_seed_and_batch():
    asked = []

    def task(i, rng):
        asked.append((i, rng.integers(1 << 30)))
        return VALID[0]

    sweep(base_model("float32"), task, [lora(1), lora(2)], seeds=(5, 6), lrs=(1e-3, 1e-2), chunk=8,
          train=quiet(steps=3, accumulate=2))
    assert len(asked) == len(set(asked)) == 2 * 6
    expected = []
    for seed in (5, 6):
        batches = task_batches(lambda i, rng: expected.append((i, rng.integers(1 << 30))), seed)
        for i in range(6):
            batches(i)
    assert sorted(asked) == sorted(expected)
    assert asked[0][1] != np.random.default_rng(5).integers(1 << 30)            # not the stream of the adapter's start


def test_a_task_may_give_each_cell_its_own_batch(device):
    model, plain = base_model(), task_of(2, 6)

    def own(i, rng):                                                            # cell k sees the batches of seed 10 + k
        return tuple(np.stack(side) for side in zip(*(task_batches(plain, 10 + k)(i) for k in range(4))))

    result = sweep(model, own, [lora(2), lora(3)], lrs=(1e-2, 2e-2), train=quiet(), chunk=3)
    for k in range(4):
        add_adapter(model, lora((2, 3)[k // 2]), seed=0)
        history = train(model, task_batches(plain, 10 + k), quiet(lr=(1e-2, 2e-2)[k % 2]))
        assert_allclose(result.losses[:, k], history.loss, rtol=1e-10)
        delete_adapter(model, "default")


def test_a_loss_of_ones_own(device):
    """Σ_v p (log p - log q) against given log p (B, T, V), for each cell; twice the batch in two parts is the mean."""
    model, rng = base_model(), np.random.default_rng(8)
    log_p = np.log(rng.dirichlet(np.ones(VOCAB), (3, 5)))
    ids = rng.integers(0, VOCAB, (3, 5))

    def kl(logits, targets, K):
        log_q = log_softmax(logits).reshape(K, -1, VOCAB)
        target = to_device(targets.reshape(log_q.shape))
        return ((target - log_q) * to_device(np.exp(targets.reshape(log_q.shape)))).sum(axis=(1, 2)) * (1 / 15)

    found = [sweep(model, lambda i, rng: (ids, log_p), [lora(2), lora(4)], train=quiet(accumulate=a),
                   evaluate=[(ids, log_p)], loss=kl) for a in (1, 2)]
    assert_allclose(found[0].losses, found[1].losses, rtol=1e-12)
    result = found[0]
    log_q = to_host(log_softmax(model(ids)))
    assert result.losses[0] == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-12)
    for k in range(2):
        result.install(model, k)
        log_q = to_host(log_softmax(model(ids)))
        assert result.rows[k]["eval_loss"] == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-10)
        delete_adapter(model, "default")


def state_of(model: Transformer) -> Any:
    """Everything about a model that a sweep could leave changed."""
    modules = dict(model.named_modules())
    return ({path: to_host(p).copy() for path, p in model.named_parameters()},
            {path: p.requires_grad for path, p in model.named_parameters()},
            {path: (m.training, id(getattr(m, "adaptation", None))) for path, m in modules.items()},
            {path: (dict(m.adapters), list(m.active), m.enabled) for path, m in modules.items() if hasattr(m, "active")},
            getattr(model, "adapter_configs", "none"), [p.grad for _, p in model.named_parameters()],
            {path: rng.bit_generator.state for path, rng in model.named_generators()})


@pytest.mark.slow_on_the_stand_in
@pytest.mark.parametrize("prepare", ["plain", "adapters", "unfrozen"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(device, prepare, fails):
    model = base_model("float32")
    if prepare == "adapters":
        add_adapter(model, lora(2, init_lora_weights=False), "first", seed=1)
        add_adapter(model, lora(3, target_modules=["qkv_proj"]), "sweep", seed=2)
        set_adapter(model, ["first", "sweep"])
        model.eval()
    elif prepare == "unfrozen":
        model.unfreeze()
        model.layers[0].eval()
    before, logits = state_of(model), to_host(model(VALID[0][0])).copy()

    def task(i, rng):
        if fails and i == 2:
            raise KeyboardInterrupt
        return task_of(2, 6)(i, rng)

    if fails:
        with pytest.raises(KeyboardInterrupt):
            sweep(model, task, [lora(2), lora(1)], train=quiet(), evaluate=VALID)
    else:
        result = sweep(model, task, [lora(2), lora(1)], train=quiet(), evaluate=VALID)
        assert_equals_alone(base_model("float32"), task, [lora(2), lora(1)], (0,), (1e-2,), quiet(), result, rtol=2e-4)
    after = state_of(model)
    assert before[0].keys() == after[0].keys()
    for path in before[0]:
        assert_array_equal(before[0][path], after[0][path], err_msg=path)
    assert before[1:] == after[1:]
    assert_array_equal(to_host(model(VALID[0][0])), logits)


def test_an_adapter_of_a_sweep_becomes_a_normal_one(device):
    model = base_model()
    plain = to_host(model(VALID[0][0])).copy()
    result = sweep(model, task_of(2, 6), [lora(2), lora(4, use_rslora=True)], lrs=(5e-2,), train=quiet(), evaluate=VALID)
    assert_array_equal(to_host(model(VALID[0][0])), plain)
    result.install(model, 1, "learned")
    result.adapter(0).install(model)
    for name, k in (("learned", 1), ("default", 0)):
        set_adapter(model, name)
        assert mean_loss(model, VALID) == pytest.approx(result.rows[k]["eval_loss"], rel=1e-12)
        size = sum(p.size for a in adapters_of(model, name).values() for _, p in a.named_parameters())
        assert result.rows[k]["parameters"] == size
        merge_adapter(model)
        assert mean_loss(model, VALID) == pytest.approx(result.rows[k]["eval_loss"], rel=1e-10)
        unmerge_adapter(model)
    assert result.rows[0]["eval_loss"] != result.rows[1]["eval_loss"]
    with pytest.raises(ValueError, match="already has an adapter 'learned'"):
        result.install(model, 0, "learned")


def test_a_diverging_cell_leaves_the_others_alone(device):
    model, task = base_model("float32"), task_of(2, 6)
    mixed = sweep(model, task, [lora(2)], lrs=(1e-2, 1e30, 2e-2), train=quiet(clip=0.5), evaluate=VALID)
    clean = sweep(model, task, [lora(2)], lrs=(1e-2, 2e-2), train=quiet(clip=0.5), evaluate=VALID)
    assert [row["diverged"] for row in mixed.rows] == [False, True, False]
    assert np.isnan(mixed.losses[-1, 1]) and np.isnan(mixed.rows[1]["eval_loss"])
    assert_allclose(mixed.losses[:, [0, 2]], clean.losses, rtol=1e-5)
    assert_allclose([mixed.rows[k]["eval_loss"] for k in (0, 2)], [row["eval_loss"] for row in clean.rows], rtol=1e-5)


def test_no_step_waits_for_the_device():
    before = current_device().name
    set_device("fake")
    try:
        waits = []
        for steps, log_every in ((2, 100), (6, 100), (6, 3)):
            model = base_model("float32")
            with fake_device.count() as counts:
                sweep(model, task_of(2, 6), [lora(1), lora(2)], seeds=(0, 1), chunk=4,
                      train=quiet(steps=steps, log_every=log_every, clip=0.1, accumulate=2))
            waits.append(counts.syncs)
    finally:
        set_device(before)
    assert waits[1] == waits[0] and waits[2] == waits[0] + 1


def test_float32_stays_float32(device, monkeypatch):
    seen = []
    plain = LoRAStack.unstacked
    monkeypatch.setattr(LoRAStack, "unstacked", lambda self: seen.extend(
        [self.lora_A.dtype, self.lora_A.grad.dtype, self.lora_B.grad.dtype, self.scales.dtype]) or plain(self))
    result = sweep(base_model("float32"), task_of(2, 6), [lora(2)], seeds=(0, 1), train=quiet(clip=0.1))
    assert set(seen) == {np.dtype("float32")} and seen
    assert {a.dtype for own in result.adapter(0).parameters.values() for a in own.values()} == {np.dtype("float32")}


@pytest.mark.parametrize("config, B, T", [
    (lora(8, target_modules="all-linear"), 8, 32), (lora(8, target_modules=["q_proj"]), 2, 8),
    (VeraConfig(r=256, target_modules="all-linear"), 2, 8), (VeraConfig(r=256, target_modules="all-linear"), 8, 32),
    (AdaLoraConfig(init_r=16, total_step=9, target_modules="all-linear"), 2, 8),
], ids=["LoRA, all", "LoRA, q", "VeRA, few tokens", "VeRA", "AdaLoRA"])
def test_the_estimate_of_memory_is_near_the_measured_one(config, B, T):
    """One more cell takes no more than estimated, and at least a third of it, so `memory` is kept and used."""
    model, task = base_model("float32", d_model=64, d_ff=None, n_heads=4, vocab_size=99, max_len=64), task_of(B, T)
    peaks = []
    for n in (2, 6):
        tracemalloc.start()
        try:
            sweep(model, task, [config], lrs=[1e-3] * n, train=quiet(steps=2, clip=1.0), chunk=n)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    add_adapter(model, config)
    estimate = bytes_per_cell(model, adapters_of(model), {"ids": np.zeros((B, T), int)}, ())
    measured = (peaks[1] - peaks[0]) / 4
    assert measured < estimate < 3 * measured


@pytest.mark.parametrize("configs, options, message", [
    ([], {}, "got no cells"),
    ([lora(2)], {"seeds": ()}, "got no cells"),
    ([lora(2)], {"chunk": 0}, "chunk = 0"),
    ([lora(2, lora_dropout=0.1)], {}, "lora_dropout = 0.1, expected 0"),
    ([lora(2), lora(2, target_modules=["q_proj"])], {}, "cell 1 differs from cell 0 in whether it adapts layers.0.attn.o_proj"),
    ([lora(2, target_modules=["embed"])], {}, "embed has a LoRAEmbedding, which cannot be stacked"),
    ([lora(99)], {}, "rank 99"),
    ([lora(2, use_dora=True)], {}, "has a DoRA, which cannot be stacked"),
    ([lora(2, init_lora_weights="eva")], {}, "has a EVA, which cannot be stacked"),
    ([lora(2, modules_to_save=["embed"])], {}, "embed has a Replacement, which cannot be stacked"),
    ([VeraConfig(r=2, target_modules=TARGETS)], {"loraplus_lr_ratio": 2.0}, "with parameters besides A and B, expected LoRA"),
    ([lora(2), LoraFAConfig(r=2, target_modules=TARGETS)], {}, "cell 1 has a LoRAFA on .* where cell 0 has a LoRA"),
    ([VeraConfig(r=2, vera_dropout=0.1, target_modules=TARGETS)], {}, "vera_dropout = 0.1, expected 0"),
    ([TensorTrainConfig(r=2, order=o, target_modules=TARGETS) for o in (2, 3)], {},
     "has other parameters on .*: run one sweep for each order"),
    ([lora(2)], {"loraplus_lr_ratio": 0.5}, "loraplus_lr_ratio = 0.5, expected at least 1"),
    ([lora(2)], {"train": quiet(eval_every=1, patience=2)}, "train.patience = 2, expected None"),
    ([lora(2)], {"train": quiet(checkpoint="x")}, "train.checkpoint = 'x', expected None"),
    ([lora(2)], {"evaluate": []}, "evaluate: got no batches"),
    ([lora(2)], {"lrs": (-1.0,)}, "learning rates"),
])
def test_guards(configs, options, message):
    model = base_model()
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        sweep(model, task_of(2, 6), configs, **{"train": quiet()} | options)
    assert "\n" not in str(caught.value)
    assert state_of(model)[1:] == before[1:]


def test_a_model_with_dropout_trains_in_evaluation_mode_only():
    model = base_model(dropout=0.1)
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        sweep(model, task_of(2, 6), [lora(2)], train=quiet())
    result = sweep(model.eval(), task_of(2, 6), [lora(2)], train=quiet())
    assert_array_equal(result.losses, sweep(base_model(), task_of(2, 6), [lora(2)], train=quiet()).losses)


def test_merged_adapters_are_refused():
    model = base_model()
    add_adapter(model, lora(2))
    merge_adapter(model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        sweep(model, task_of(2, 6), [lora(2)], train=quiet())


def test_batches_of_different_shapes_are_refused():
    def task(i, rng):
        return task_of(2, 4 + int(rng.integers(9)))(i, rng)

    with pytest.raises(ValueError, match=r"batch 0 of the task has ids of shapes .* expected one shape for all cells"):
        sweep(base_model(), task, [lora(2)], seeds=range(6), train=quiet(), chunk=6)
