"""Prompt tuning and prefix tuning against PEFT: folders both ways, the same logits, losses and gradients."""

from __future__ import annotations

import numpy as np
import pytest
from parity_twins import close, peft, torch, twins

import minilora as ml
from minilora.backend import to_host
from minilora.lora import adapters_of

P = 5
OURS = {"prompt": ml.PromptTuningConfig, "prefix": ml.PrefixTuningConfig}
THEIRS = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_peft_reads_ours_and_computes_the_same(name, form, tmp_path, rng):
    ours, theirs = twins(form)
    tuned = ml.VirtualTokens(ours)
    ml.add_adapter(tuned, OURS[name](num_virtual_tokens=P))
    prompt = adapters_of(tuned)["embed"].prompt
    prompt.data[...] = rng.standard_normal(prompt.shape)
    ml.save_adapter(tuned, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path).double().eval()
    wrapped.prompt_encoder.requires_grad_(True)            # PEFT loads them to use, not to train
    ids = rng.integers(0, ours.cfg.vocab_size, (2, 7))
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
    for given in (np.ones_like(mask), mask):
        targets = np.where(given != 0, rng.integers(0, ours.cfg.vocab_size, ids.shape), -100)
        logits = wrapped(input_ids=torch.tensor(ids), attention_mask=torch.tensor(given)).logits[:, -7:]
        got = tuned(ids, attention_mask=given)
        real = given != 0
        close(to_host(got.data)[real], logits.detach().numpy()[real], 1e-6, "logits")
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), torch.tensor(targets).reshape(-1))
        wrapped.zero_grad()
        loss.backward()
        prompt.grad = None
        ml.cross_entropy(got, targets).backward()
        close(to_host(prompt.grad), wrapped.prompt_encoder["default"].embedding.weight.grad.numpy(), 1e-6, "gradient")


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_ours_reads_pefts(name, form, tmp_path, rng):
    ours, theirs = twins(form)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(theirs, THEIRS[name](num_virtual_tokens=P, task_type="CAUSAL_LM")).double().eval()
    wrapped.save_pretrained(tmp_path)
    tuned = ml.VirtualTokens(ours)
    ml.load_adapter(tuned, tmp_path)
    ids = rng.integers(0, ours.cfg.vocab_size, (2, 6))
    with torch.no_grad():
        expected = wrapped(input_ids=torch.tensor(ids), attention_mask=torch.ones(2, 6, dtype=torch.long)).logits[:, -6:]
    close(to_host(tuned(ids).data), expected.numpy(), 1e-6, "logits")
