"""Optimisers against their equations in plain Python, schedules, the loop's bookkeeping, and resuming bit for bit."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import fake_device
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from minilora.autograd import cross_entropy
from minilora.backend import to_host
from minilora.lora import LoraConfig, add_adapter, merge_adapter, set_adapter, unmerge_adapter
from minilora.nn import Parameter, Transformer, TransformerConfig
from minilora.training import SGD, AdamW, TrainConfig, clip_grad_norm, mean_loss, schedule, train
from minilora.training.checkpoint import FILE, load_checkpoint, save_checkpoint

VOCAB = 19


def adapted_model(dtype: str = "float32", dropout: float = 0.0, r: int = 3) -> Transformer:
    cfg = TransformerConfig.llama(vocab_size=VOCAB, d_model=12, n_layers=2, n_heads=2, d_ff=20, max_len=16, dropout=dropout)
    model = Transformer(cfg, seed=4, dtype=dtype)
    model.head.weight.data *= 25.0                                 # a head that can tell tokens apart
    add_adapter(model, LoraConfig(r=r, lora_alpha=6, lora_dropout=dropout, target_modules="all-linear"), seed=5)
    return model


def batches(i: int, B: int = 3, T: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Repeatable batches in which the next token follows from the last; some targets do not count."""
    rng = np.random.default_rng([7, i])
    ids = rng.integers(0, VOCAB, (B, T))
    targets = (3 * ids + 1) % VOCAB
    targets[rng.random((B, T)) < 0.3] = -100
    targets[0, 0] = 1
    return ids, targets


def values(model: Transformer) -> dict[str, np.ndarray]:
    return {path: to_host(p).copy() for path, p in model.named_parameters(trainable=True)}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys() and a
    for path in a:
        assert_array_equal(a[path], b[path], err_msg=path)


def quiet(**fields: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 6, "lr": 1e-2, "progress": False} | fields)


def parameters(put, rng, *shapes, dtype="float64") -> list[Parameter]:
    return [Parameter(put(rng.standard_normal(shape), dtype)) for shape in shapes]


def give_gradients(put, rng, params) -> list[np.ndarray]:
    gradients = [rng.standard_normal(p.shape) for p in params]
    for p, g in zip(params, gradients):
        p.grad = put(g.copy(), p.dtype)
    return gradients


# AdamW and SGD


def adamw_by_hand(p, gradients, lr, beta1, beta2, eps, weight_decay):
    """The update of one number, from the equations of Loshchilov & Hutter (Algorithm 2)."""
    m = v = 0.0
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        p = p - lr * weight_decay * p - lr * m_hat / (math.sqrt(v_hat) + eps)
    return p


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_is_its_equation(put, rng, weight_decay):
    (p,) = parameters(put, rng, (3, 1, 4))
    start = to_host(p).copy()
    optimizer = AdamW([p], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=weight_decay)
    seen = []
    for _ in range(6):
        seen += give_gradients(put, rng, [p])
        optimizer.step(0.5)                                        # the schedule's factor: a rate of 0.05
    expected = [adamw_by_hand(start.flat[i], [g.flat[i] for g in seen], 0.05, 0.8, 0.95, 1e-3, weight_decay)
                for i in range(start.size)]
    assert_allclose(to_host(p).ravel(), expected, rtol=1e-13)


def test_decay_is_decoupled(put, rng):
    """The decay is lr · λ · p whatever the gradient: huge, tiny or zero. (As an L2 penalty it would be divided by √v.)"""
    for size in (1e6, 1e-6, 0.0):
        plain, decayed = (Parameter(put(np.linspace(-2, 3, 5))) for _ in range(2))
        start, g = to_host(plain).copy(), size * rng.standard_normal(5)
        for p, weight_decay in ((plain, 0.0), (decayed, 0.2)):
            p.grad = put(g)
            AdamW([p], lr=0.1, weight_decay=weight_decay).step()
        assert_allclose(to_host(decayed) - to_host(plain), -0.1 * 0.2 * start, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("momentum, weight_decay", [(0.0, 0.0), (0.9, 0.0), (0.9, 0.1), (0.0, 0.1)])
def test_sgd_is_its_equation(put, rng, momentum, weight_decay):
    (p,) = parameters(put, rng, (4, 3))
    expected, u = to_host(p).copy(), np.zeros((4, 3))
    optimizer = SGD([p], lr=0.4, momentum=momentum, weight_decay=weight_decay)
    for _ in range(4):
        (g,) = give_gradients(put, rng, [p])
        u = momentum * u + g + weight_decay * expected
        expected = expected - 0.1 * u
        optimizer.step(0.25)
    assert_allclose(to_host(p), expected, rtol=1e-13)


@pytest.mark.parametrize("make", [AdamW, lambda params, **o: SGD(params, **{"lr": 1e-3} | o)], ids=["adamw", "sgd"])
def test_groups_have_their_own_options(put, rng, make):
    params = parameters(put, rng, (3,), (2, 2), (4,))
    apart = [Parameter(p.data.copy()) for p in params]
    together = make([{"params": params[:1], "lr": 0.3}, {"params": params[1:2], "weight_decay": 0.5}, {"params": params[2:]}],
                    lr=0.01)
    single = [make([apart[0]], lr=0.3), make([apart[1]], lr=0.01, weight_decay=0.5), make([apart[2]], lr=0.01)]
    for _ in range(3):
        for q, g in zip(apart, give_gradients(put, rng, params)):
            q.grad = put(g)
        together.step(0.5)
        for optimizer in single:
            optimizer.step(0.5)
    for p, q in zip(params, apart):
        assert_array_equal(to_host(p), to_host(q))


@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_a_rate_for_each_adapter_is_k_optimisers(put, rng, kind):
    rates = np.array([0.1, 0.0, 0.02])
    params = parameters(put, rng, (3, 2, 4), (3, 5, 2), (3, 4))
    apart = [[Parameter(p.data[k].copy()) for p in params] for k in range(3)]
    together, single = kind(params, lr=rates), [kind(own, lr=float(lr)) for own, lr in zip(apart, rates)]
    for _ in range(3):
        gradients = give_gradients(put, rng, params)
        together.step(0.7)
        for k, optimizer in enumerate(single):
            for p, g in zip(apart[k], gradients):
                p.grad = put(g[k])
            optimizer.step(0.7)
    for k in range(3):
        for p, q in zip(params, apart[k]):
            assert_allclose(to_host(p)[k], to_host(q), rtol=1e-14)


def test_a_parameter_without_gradient_rests_and_keeps_its_own_count(put, rng):
    late, alone = Parameter(put(np.array([1.0, -2.0]))), Parameter(put(np.array([1.0, -2.0])))
    (busy,) = parameters(put, rng, (2,))
    both, single = AdamW([busy, late], lr=0.1, weight_decay=0.5), AdamW([alone], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        give_gradients(put, rng, [busy])
        both.step()
    assert_array_equal(to_host(late), [1.0, -2.0])
    late.grad = alone.grad = put(np.array([0.3, 0.4]))
    both.step()
    single.step()
    assert_array_equal(to_host(late), to_host(alone))


def test_updates_are_written_in_place(put, rng):
    buffer = put(rng.standard_normal((6, 2)))
    block = Parameter(buffer[2:4])
    array, before = block.data, to_host(buffer).copy()
    for optimizer in (AdamW([block], lr=0.1), SGD([block], lr=0.1, momentum=0.9)):
        give_gradients(put, rng, [block])
        optimizer.step()
        assert block.data is array
    after = to_host(buffer)
    assert_array_equal(after[2:4], to_host(block))
    assert (after[2:4] != before[2:4]).all() and (after[[0, 1, 4, 5]] == before[[0, 1, 4, 5]]).all()


def test_zero_grad_forgets(put, rng):
    params = parameters(put, rng, (2,), (3,))
    give_gradients(put, rng, params)
    AdamW(params).zero_grad()
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize("kind", [AdamW, lambda params: SGD(params, lr=0.1, momentum=0.9)], ids=["adamw", "sgd"])
def test_optimiser_state_goes_through_the_host(put, rng, kind):
    params = parameters(put, rng, (3, 2), (4,), dtype="float32")
    first = kind(params)
    give_gradients(put, rng, params)
    first.step()
    copies = [Parameter(p.data.copy()) for p in params]
    second = kind(copies)
    state = first.state_dict()
    assert all(isinstance(array, np.ndarray) for array in state.values())
    second.load_state_dict(state)
    for p, q, _ in zip(params, copies, give_gradients(put, rng, params)):
        q.grad = p.grad.copy()
    first.step()
    second.step()
    for p, q in zip(params, copies):
        assert_array_equal(to_host(p), to_host(q))
    with pytest.raises(ValueError, match="got shape"):
        second.load_state_dict({**state, next(n for n in state if not n.endswith("step")): np.zeros((9, 9))})
    with pytest.raises(ValueError, match="only on one side"):
        second.load_state_dict({**state, "7.m": np.zeros(3)})


@pytest.mark.parametrize("params, options, error, message", [
    ([], {}, ValueError, "no parameters"),
    ([("path", 1)], {}, TypeError, "got a tuple, expected Parameters"),
    ([{"params": [Parameter(np.zeros(2))], "rate": 1.0}], {}, ValueError, "the option 'rate'"),
    ([Parameter(np.zeros(2))], {"lr": -1.0}, ValueError, "learning rate -1.0"),
    ([Parameter(np.zeros(2))], {"lr": math.nan}, ValueError, "learning rate nan"),
    ([Parameter(np.zeros((2, 2)))], {"lr": np.ones(3)}, ValueError, "3 learning rates"),
    ([Parameter(np.zeros((2, 2)))], {"lr": np.ones((2, 1))}, ValueError, "shape \\(2, 1\\)"),
])
def test_optimiser_guards(params, options, error, message):
    with pytest.raises(error, match=message):
        AdamW(params, **options)


def test_a_parameter_given_twice_is_refused():
    p = Parameter(np.zeros(2))
    with pytest.raises(ValueError, match="twice"):
        AdamW([{"params": [p]}, {"params": [p]}])


# Clipping


def test_clipping_scales_all_gradients_to_the_norm(put, rng):
    params = parameters(put, rng, (3, 4), (1,), (), (2,))
    gradients = give_gradients(put, rng, params)
    params[3].grad = None
    norm = math.sqrt(sum((g**2).sum() for g in gradients[:3]))
    found = clip_grad_norm(params, norm / 4)
    assert found.shape == () and float(to_host(found)) == pytest.approx(norm, rel=1e-14)
    for p, g in zip(params[:3], gradients):
        assert_allclose(to_host(p.grad), g / 4, rtol=1e-14)
    assert params[3].grad is None


def test_a_small_gradient_is_left_bit_for_bit(put, rng):
    params = parameters(put, rng, (3, 4), dtype="float32")
    (g,) = give_gradients(put, rng, params)
    clip_grad_norm(params, 1e3)
    assert_array_equal(to_host(params[0].grad), g.astype("float32"))
    params[0].grad = put(np.zeros((3, 4), "float32"))
    assert float(to_host(clip_grad_norm(params, 1.0))) == 0.0
    assert_array_equal(to_host(params[0].grad), np.zeros((3, 4)))


def test_each_adapter_is_clipped_by_its_own_norm(put, rng):
    params = parameters(put, rng, (3, 2, 4), (3, 5))
    gradients = give_gradients(put, rng, params)
    norms = np.sqrt(sum((g.reshape(3, -1) ** 2).sum(axis=1) for g in gradients))
    limit = float(np.sort(norms)[1])
    assert_allclose(to_host(clip_grad_norm(params, limit, groups=3)), norms, rtol=1e-14)
    for p, g in zip(params, gradients):
        factor = np.minimum(1.0, limit / norms).reshape(-1, *[1] * (g.ndim - 1))
        assert_allclose(to_host(p.grad), g * factor, rtol=1e-14)


def test_clipping_guards():
    p = Parameter(np.zeros(2))
    with pytest.raises(ValueError, match="call backward"):
        clip_grad_norm([p], 1.0)
    with pytest.raises(ValueError, match="max_norm = 0"):
        clip_grad_norm([p], 0.0)


# Schedules


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps, warmup, w", [(10, 0, 0), (10, 3, 3), (20, 0.25, 5), (7, 7, 7), (1, 0, 0)])
def test_schedules(name, steps, warmup, w):
    found = [schedule(name, step, steps, warmup) for step in range(steps)]
    assert all(0.0 < f <= 1.0 for f in found)
    assert_allclose(found[:w], np.arange(1, w + 1) / (w + 1), rtol=1e-15)
    t = np.arange(steps - w) / max(steps - w, 1)
    after = {"constant": np.ones_like(t), "linear": 1 - t, "cosine": np.cos(np.pi * t / 2) ** 2}[name]
    assert_allclose(found[w:], after, rtol=1e-13)
    assert w == steps or found[w] == 1.0


@pytest.mark.parametrize("arguments, message", [
    (("linaer", 0, 10, 0), "schedule 'linaer', expected one of constant, linear, cosine"),
    (("linear", 10, 10, 0), "step 10 of 10"), (("linear", 0, 10, 11), "warmup = 11"), (("linear", 0, 10, -1), "warmup = -1")])
def test_schedule_guards(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule(*arguments)


# The loop


def test_train_is_the_update_written_out(device):
    """Every number of `train` against a loop written by hand from the optimiser's parts."""
    model, twin = adapted_model(), adapted_model()
    history = train(model, batches, quiet(warmup=2, schedule="cosine", weight_decay=0.1, clip=0.05))
    params = [p for _, p in twin.named_parameters(trainable=True)]
    optimizer, losses = AdamW(params, lr=1e-2, weight_decay=0.1), []
    for step in range(6):
        loss = twin.loss(*batches(step))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm(params, 0.05)
        optimizer.step(schedule("cosine", step, 6, 2))
    assert history.loss == losses
    assert history.lr == [1e-2 * schedule("cosine", step, 6, 2) for step in range(6)]
    assert_same(values(model), values(twin))
    assert history.tokens == 6 * 18 and history.seconds > 0 and history.eval == [] and history.best is None


def test_training_learns_and_leaves_the_base_alone(device):
    model = adapted_model()
    base = {path: to_host(p).copy() for path, p in model.named_parameters(trainable=False)}
    history = train(model, lambda i: batches(0), quiet(steps=20, lr=3e-2))
    assert history.loss[-1] < history.loss[0] / 2
    assert_same(base, {path: to_host(p) for path, p in model.named_parameters(trainable=False)})


def test_accumulated_batches_are_one_big_batch(device):
    """Every counted target weighs the same, although the micro-batches hold different numbers of them."""
    def parts(i):
        return batches(i, B=1 + i % 3)

    def whole(i):
        return tuple(np.concatenate(side) for side in zip(*(parts(3 * i + j) for j in range(3))))

    found = []
    for source, accumulate in ((parts, 3), (whole, 1)):
        model = adapted_model("float64")
        optimizer = SGD([p for _, p in model.named_parameters(trainable=True)], lr=1.0)
        history = train(model, source, quiet(steps=4, accumulate=accumulate), optimizer=optimizer)
        found.append((values(model), history.loss))
    assert_allclose(found[0][1], found[1][1], rtol=1e-12)
    for path, value in found[0][0].items():
        assert_allclose(value, found[1][0][path], rtol=1e-10, atol=1e-14)


def test_a_loss_of_ones_own_is_averaged_with_equal_weights(device):
    seen = []

    def loss(model, batch):
        seen.append(cross_entropy(model(batch["question"]), batch["answer"]))
        return seen[-1]

    def source(i):
        return dict(zip(("question", "answer"), batches(i)))

    history = train(adapted_model("float64"), source, quiet(steps=2, accumulate=2), loss=loss,
                    evaluate=[source(0), source(1)])
    each = [value.item() for value in seen]
    assert_allclose(history.loss, [(each[0] + each[1]) / 2, (each[2] + each[3]) / 2], rtol=1e-14)
    assert history.eval == [(2, pytest.approx((each[4] + each[5]) / 2, rel=1e-14))]


def test_an_optimiser_of_ones_own_keeps_its_rates(device):
    model = adapted_model("float64")
    named = dict(model.named_parameters(trainable=True))
    A, B = ([p for path, p in named.items() if path.endswith(end)] for end in ("lora_A", "lora_B"))
    before = values(model)
    history = train(model, batches, quiet(steps=1, lr=0.5, schedule="constant"),
                    optimizer=AdamW([{"params": A, "lr": 0.0}, {"params": B, "lr": 0.25}], weight_decay=0.0))
    after = values(model)
    assert history.lr == [0.0]
    for path in named:
        change = abs(after[path] - before[path]).max()
        assert change == 0.0 if path.endswith("lora_A") else change == pytest.approx(0.25, rel=1e-3)


def test_dicts_carry_masks_and_tokens_are_counted_without_padding(device):
    ids, targets = batches(0)
    mask = np.ones_like(ids)
    mask[1:, 4:] = 0
    targets[mask == 0] = -100
    other = ids.copy()
    other[mask == 0] = 2
    found = [train(adapted_model(), lambda i, x=x: {"ids": x, "targets": targets, "attention_mask": mask}, quiet(steps=3))
             for x in (ids, other)]
    assert found[0].tokens == 3 * int(mask.sum()) and found[0].loss == found[1].loss


def test_evaluation_by_batches_is_the_mean_over_targets(device):
    model, valid = adapted_model("float64"), [batches(i, B=1 + i) for i in range(3)]
    logits = [to_host(model(ids)) for ids, _ in valid]
    log_p = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits]
    chosen = np.concatenate([np.take_along_axis(lp, np.maximum(t, 0)[..., None], -1)[..., 0][t != -100]
                             for lp, (_, t) in zip(log_p, valid)])
    assert mean_loss(model, valid) == pytest.approx(-chosen.mean(), rel=1e-12)
    assert train(model, batches, quiet(), evaluate=iter(valid)).eval == [(6, mean_loss(model, valid))]
    for use in (lambda: mean_loss(model, []), lambda: train(model, batches, quiet(), evaluate=[])):
        with pytest.raises(ValueError, match="no batches"):
            use()


def test_label_smoothing_and_ignored_targets_reach_the_loss_but_not_the_evaluation(device):
    model, (ids, targets) = adapted_model("float64"), batches(0)
    changed = np.where(targets == -100, 0, targets)                # 0 is now what does not count
    before = mean_loss(model, [batches(1)])
    smooth = cross_entropy(model(ids), changed, ignore_index=0, label_smoothing=0.2).item()
    found = train(model, lambda i: (ids, changed), quiet(steps=1, lr=0.0, label_smoothing=0.2, ignore_index=0))
    plain = train(model, lambda i: batches(0), quiet(steps=1, lr=0.0, label_smoothing=0.2), evaluate=[batches(1)])
    assert found.loss == [pytest.approx(smooth, rel=1e-14)]                # the same sum in another order
    assert abs(smooth - cross_entropy(model(ids), targets).item()) > 1e-3
    assert plain.eval == [(1, pytest.approx(before, rel=1e-14))]


def test_evaluation_records_no_graph():
    model, seen = adapted_model(), []
    mean_loss(lambda ids: seen.append(model(ids)) or seen[-1], [batches(0), batches(1)])
    assert [logits.requires_grad for logits in seen] == [False, False]


def test_evaluation_changes_no_number_of_the_run(device):
    """It runs without dropout and without gradients, and takes nothing from the run's random numbers."""
    modes = []

    def evaluate(model):
        modes.append((model.training, model(batches(0)[0]).requires_grad))
        return 1.0

    plain, watched = adapted_model(dropout=0.2), adapted_model(dropout=0.2)
    first = train(plain, batches, quiet())
    second = train(watched, batches, quiet(eval_every=2), evaluate=evaluate)
    assert first.loss == second.loss
    assert_same(values(plain), values(watched))
    assert modes == [(False, False)] * 3 and second.eval == [(2, 1.0), (4, 1.0), (6, 1.0)] and second.best == (2, 1.0)


def scripted(script: list[float], snapshots: list[dict]) -> Any:
    """An evaluation that returns these values in turn, and remembers the parameters it saw."""
    def evaluate(model):
        snapshots.append(values(model))
        return script[len(snapshots) - 1]
    return evaluate


def test_early_stop_ends_with_the_best_parameters(device):
    model, seen = adapted_model(), []
    history = train(model, batches, quiet(steps=50, eval_every=2, patience=2),
                    evaluate=scripted([3.0, 1.0, 2.0, 0.5, math.nan, 0.5, 0.1], seen))
    assert [value for _, value in history.eval][:4] == [3.0, 1.0, 2.0, 0.5] and len(history.eval) == 6
    assert history.best == (8, 0.5) and len(history.loss) == 12
    assert_same(values(model), seen[3])
    assert any((seen[3][path] != seen[5][path]).any() for path in seen[3])


def test_without_patience_the_last_parameters_stay(device):
    model, seen = adapted_model(), []
    history = train(model, batches, quiet(steps=6, eval_every=2), evaluate=scripted([1.0, 2.0, 3.0], seen))
    assert history.best == (2, 1.0) and len(history.loss) == 6
    assert_same(values(model), seen[2])


def test_patience_restores_the_best_at_the_end_of_the_run_too(device):
    model, seen = adapted_model(), []
    train(model, batches, quiet(steps=6, eval_every=2, patience=5), evaluate=scripted([1.0, 2.0, 3.0], seen))
    assert_same(values(model), seen[0])


def test_callback_sees_each_update_with_its_gradients(device):
    seen = []
    model = adapted_model()
    train(model, batches, quiet(steps=4, log_every=2), callback=lambda step, m, history: seen.append(
        (step, m is model, all(p.grad is not None for _, p in m.named_parameters(trainable=True)), len(history.lr))))
    assert seen == [(1, True, True, 1), (2, True, True, 2), (3, True, True, 3), (4, True, True, 4)]
    assert all(p.grad is None for _, p in model.named_parameters())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_also_after_an_error(training):
    model = adapted_model().train(training)

    def failing(i):
        if i == 2:
            raise KeyboardInterrupt
        assert model.training
        return batches(i)

    with pytest.raises(KeyboardInterrupt):
        train(model, failing, quiet())
    assert all(m.training is training for _, m in model.named_modules())
    assert all(p.grad is None for _, p in model.named_parameters())


def test_iterables_serve_as_batches(device):
    three = [batches(i) for i in range(3)]
    found = [train(adapted_model(), source, quiet(steps=3)).loss for source in (batches, three, iter(three))]
    assert found[0] == found[1] == found[2]


def test_no_step_waits_for_the_device():
    """Losses come to the host together: as many waits for 3 steps as for 9, and one more for one more look."""
    from minilora.backend import current_device, set_device
    before = current_device().name
    set_device("fake")
    try:
        waits = []
        for steps, log_every in ((3, 100), (9, 100), (9, 5)):
            model = adapted_model(dropout=0.1)
            with fake_device.count() as counts:
                train(model, batches, quiet(steps=steps, log_every=log_every, clip=0.1, weight_decay=0.1, accumulate=2))
            waits.append(counts.syncs)
    finally:
        set_device(before)
    assert waits == [1, 1, 2]


def test_float32_stays_float32(device):
    model = adapted_model()
    optimizer = AdamW([p for _, p in model.named_parameters(trainable=True)], weight_decay=0.1)
    grads = []
    train(model, batches, quiet(clip=0.1, accumulate=2, warmup=0.5), optimizer=optimizer, evaluate=[batches(0)],
          callback=lambda step, m, history: grads.extend(p.grad.dtype for _, p in m.named_parameters(trainable=True)))
    assert set(grads) == {np.dtype("float32")}
    assert {array.dtype for name, array in optimizer.state_dict().items() if not name.endswith("step")} == {np.dtype("float32")}
    assert {p.dtype for _, p in model.named_parameters()} == {np.dtype("float32")}


# Checkpoints


class Cut(Exception):
    """The run is interrupted."""


def interrupted_then_resumed(source: Any, folder: Any, cut_at: int, **fields: Any) -> tuple[Any, Any]:
    """A run cut off after some update, and then run again from nothing but its folder."""
    def cut(step, model, history):
        if step == cut_at:
            raise Cut

    config = quiet(steps=11, checkpoint=str(folder), **fields)
    evaluate = [batches(100), batches(101)]
    with pytest.raises(Cut):
        train(adapted_model(dropout=0.25), source(), config, evaluate=evaluate, callback=cut)
    model = adapted_model(dropout=0.25)
    return model, train(model, source(), config, evaluate=evaluate)


@pytest.mark.parametrize("source", [lambda: batches, lambda: (batches(i) for i in range(22))], ids=["function", "generator"])
@pytest.mark.parametrize("cut_at", [4, 10])
def test_a_resumed_run_equals_the_uncut_one_bit_for_bit(tmp_path, source, cut_at):
    """float32, dropout in the model and on the adapters, Adam's moments, warm-up, accumulation and the best values so far."""
    fields = {"checkpoint_every": 3, "warmup": 5, "clip": 0.5, "accumulate": 2, "eval_every": 4, "patience": 9, "lr": 3e-2}
    uncut = adapted_model(dropout=0.25)
    expected = train(uncut, source(), quiet(steps=11, **fields), evaluate=[batches(100), batches(101)])
    model, history = interrupted_then_resumed(source, tmp_path, cut_at, **fields)
    assert_same(values(model), values(uncut))
    assert (history.loss, history.lr, history.eval, history.best, history.tokens) == \
        (expected.loss, expected.lr, expected.eval, expected.best, expected.tokens)
    assert len(history.loss) == 11
    states = [{path: rng.bit_generator.state for path, rng in m.named_generators()} for m in (model, uncut)]
    assert states[0] == states[1] and states[0]


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_every_kind_of_generator_is_saved(tmp_path, kind):
    def model():
        made = adapted_model(dropout=0.25)
        for _, module in made.named_modules():
            if hasattr(module, "rng"):
                module.rng = np.random.Generator(kind(3))
        return made

    uncut, resumed = model(), model()
    expected = train(uncut, batches, quiet(steps=4))
    with pytest.raises(Cut):
        train(model(), batches, quiet(steps=4, checkpoint=str(tmp_path), checkpoint_every=2), callback=raise_at(3))
    assert train(resumed, batches, quiet(steps=4, checkpoint=str(tmp_path), checkpoint_every=2)).loss == expected.loss


def raise_at(cut_at: int) -> Any:
    def callback(step, model, history):
        if step == cut_at:
            raise Cut
    return callback


def test_a_finished_run_is_not_run_again(tmp_path):
    config = quiet(checkpoint=str(tmp_path))
    first, again = adapted_model(), adapted_model()
    expected = train(first, batches, config)
    assert train(again, [], config) == expected
    assert_same(values(first), values(again))


def test_a_checkpoint_keeps_the_best_of_an_early_stop(tmp_path):
    config, seen = quiet(steps=20, eval_every=2, patience=2, checkpoint=str(tmp_path)), []
    model, again = adapted_model(), adapted_model()
    train(model, batches, config, evaluate=scripted([1.0, 2.0, 3.0], seen))
    history = train(again, batches, config, evaluate=[batches(0)])
    assert_same(values(again), seen[0])
    assert_same(values(model), seen[0])
    assert history.best == (2, 1.0) and len(history.loss) == 6


def test_early_stop_goes_on_over_an_interruption(tmp_path):
    """What was best before the cut, and how long ago that was, are in the checkpoint."""
    config, seen = quiet(steps=20, eval_every=2, patience=2, checkpoint=str(tmp_path), checkpoint_every=4), []
    with pytest.raises(Cut):
        train(adapted_model(), batches, config, evaluate=scripted([1.0, 2.0], seen), callback=raise_at(5))
    model = adapted_model()
    history = train(model, batches, config, evaluate=scripted([3.0, 0.0], []))
    assert history.eval == [(2, 1.0), (4, 2.0), (6, 3.0)] and history.best == (2, 1.0)
    assert_same(values(model), seen[0])


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    config = quiet(checkpoint=str(tmp_path))
    train(adapted_model(), batches, config)
    with pytest.raises(ValueError, match=r"is of a run with lr = 0.01, this one has 0.02: choose another directory"):
        train(adapted_model(), batches, quiet(lr=0.02, checkpoint=str(tmp_path)))
    with pytest.raises(ValueError, match=r"lora_A is \(3, 12\) float32, expected \(2, 12\) float32"):
        train(adapted_model(r=2), batches, config)
    with pytest.raises(ValueError, match="only on one side"):
        train(adapted_model().unfreeze(), batches, config)
    with pytest.raises(ValueError, match="optimiser state does not fit"):
        model = adapted_model()
        train(model, batches, config, optimizer=SGD([p for _, p in model.named_parameters(trainable=True)], lr=0.01))


def test_a_checkpoint_is_one_file_written_whole(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "deep", {"a": np.arange(3.0)}, {"step": 1})
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(tmp_path / "deep", {"a": np.zeros(3)}, {"step": 2})
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [FILE]
    arrays, facts = load_checkpoint(tmp_path / "deep")
    assert_array_equal(arrays["a"], [0.0, 1.0, 2.0])
    assert facts == {"step": 1}
    assert load_checkpoint(tmp_path) is None


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path):
    path = save_checkpoint(tmp_path, {"a": np.arange(3.0)}, {"step": 1})
    whole = path.read_bytes()
    for content, message in ((whole[:-5], "cannot be read"), (b"", "cannot be read"), (b"\xff" * 64, "cannot be read"),
                             (whole.replace(b"minilora checkpoint 1", b"minilora checkpoint 9"), "got format")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            load_checkpoint(tmp_path)
        assert "\n" not in str(caught.value) and FILE in str(caught.value)
    save_checkpoint(tmp_path, {"a": np.array([1.0, np.inf])}, {"step": 1})
    with pytest.raises(ValueError, match="a has values that are not finite"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, {"a": np.arange(3.0)}, {"step": 1})
    with pytest.raises(ValueError, match="has done = None, expected a bool: it is damaged"):
        train(adapted_model(), batches, quiet(checkpoint=str(tmp_path)))


# Guards of the loop


@pytest.mark.parametrize("fields, message", [
    ({"steps": 0}, "steps = 0: expected a whole number"), ({"steps": 2.5}, "steps = 2.5"), ({"lr": -1.0}, "lr = -1.0"),
    ({"lr": math.nan}, "lr = nan"), ({"warmup": 99}, "warmup = 99 with steps = 6"), ({"schedule": "step"}, "schedule = 'step'"),
    ({"clip": 0.0}, "clip = 0.0"), ({"accumulate": None}, "accumulate = None"), ({"eval_every": 0}, "eval_every = 0"),
    ({"patience": 2}, "patience = 2 without eval_every"), ({"betas": (0.9, 1.0)}, "betas"), ({"eps": 0.0}, "eps = 0.0"),
    ({"label_smoothing": 1.0}, "label_smoothing = 1.0"), ({"weight_decay": -0.1}, "weight_decay = -0.1"),
    ({"log_every": None}, "log_every = None")])
def test_config_guards(fields, message):
    with pytest.raises(ValueError, match=f"TrainConfig.{message}"):
        quiet(**fields)


def test_nothing_trains():
    model = adapted_model()
    set_adapter(model, None)
    with pytest.raises(ValueError, match="nothing trains"):
        train(model, batches, quiet())


def test_merged_adapters_are_not_trained():
    model = adapted_model()
    merge_adapter(model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        train(model, batches, quiet())
    unmerge_adapter(model)
    assert len(train(model, batches, quiet()).loss) == 6


@pytest.mark.parametrize("source, got", [([], 0), ([batches(0)] * 7, 7)])
def test_batches_that_run_dry(source, got):
    with pytest.raises(ValueError, match=rf"ran dry: got {got}, expected steps × accumulate = 12"):
        train(adapted_model(), source, quiet(accumulate=2))


@pytest.mark.parametrize("batch, got", [
    (np.zeros((2, 3), int), "a ndarray"), ((1, 2, 3), "a tuple"), (iter(()), "a tuple_iterator"),
    ({"input_ids": 1, "labels": 2}, "a dict of 'input_ids', 'labels'")])
def test_what_is_no_batch(batch, got):
    with pytest.raises(ValueError, match=f"batch: got {got}, expected"):
        train(adapted_model(), lambda i: batch, quiet())


def test_a_loss_that_is_not_finite_names_its_step():
    calls = []

    def loss(model, batch):
        calls.append(1)
        return cross_entropy(model(batch[0]), batch[1]) * (math.inf if len(calls) == 4 else 1.0)

    with pytest.raises(FloatingPointError, match=r"the loss is inf in step 4 of 6: lower the learning rate"), \
            np.errstate(all="ignore"):
        train(adapted_model(), batches, quiet(), loss=loss)


def test_patience_needs_an_evaluation():
    with pytest.raises(ValueError, match="patience = 1, but evaluate is None"):
        train(adapted_model(), batches, quiet(eval_every=1, patience=1))


def test_losses_decay_monotonically_without_noise(device):
    """One fixed batch and small plain gradient steps: every update lowers the loss (a wrong sign or factor does not)."""
    model = adapted_model("float64")
    history = train(model, lambda i: batches(0), quiet(steps=8, schedule="constant"),
                    optimizer=SGD([p for _, p in model.named_parameters(trainable=True)], lr=0.005))
    assert all(after < before for before, after in pairwise(history.loss))
