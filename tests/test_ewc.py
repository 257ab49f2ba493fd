"""Elastic weight consolidation: the Fisher information of the base, by hand, and what it holds."""

import copy
import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from minimind_sft.__main__ import main
from minimind_sft.batching import MicroBatch, pack
from minimind_sft.fisher import Scores, bases_of
from minimind_sft.losses import kl_divergence
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.priors import EKFAC, EWC

DATA = Path(__file__).resolve().parents[1] / "data"
V, H = 4, 16


def bigram_model() -> Transformer:
    """Layers that add nothing and an embedding of ones: the hidden state is 1 everywhere, the output uniform over 4."""
    model = Transformer(
        ModelConfig.minimind3(vocab_size=V, hidden_size=H, num_hidden_layers=1, tie_word_embeddings=False)
    )
    model.initialise(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name or "lm_head" in name:
                parameter.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
    return model


def document(length: int) -> MicroBatch:
    return pack([(np.arange(length) % V, np.ones(length, bool))])


def estimated(documents: int, length: int, seed: int = 0) -> tuple[EWC, Transformer]:
    base, term = bigram_model().requires_grad_(False), EWC(1.0, tokens=documents * length, seed=seed)
    term.start(base, [], half=None)
    term.read(base, (document(length) for _ in range(documents)))
    assert not any(parameter.requires_grad for parameter in base.parameters())  # as it was
    return term, base


def test_the_fisher_of_a_uniform_output_is_p_times_1_minus_p() -> None:
    term, _ = estimated(documents=400, length=9)
    fisher = term.fisher["lm_head.weight"]
    assert fisher.shape == (V, H)
    # one token's gradient is (p - onehot) h with h = 1: its mean square is 3/4 (1/4)^2 + 1/4 (3/4)^2 = 3/16
    assert fisher.mean().item() == pytest.approx(3 / 16, rel=0.05)  # per token: not 8 times as much, for 8 targets
    assert (fisher[:, :1] == fisher).all()
    assert term.fisher["model.layers.0.mlp.gate_proj.weight"].abs().max() == 0  # nothing depends on it


def test_the_loss_is_half_the_fisher_times_the_square_and_near_the_base_kl() -> None:
    term, base = estimated(documents=400, length=9)
    model, step = bigram_model(), 0.01
    with torch.no_grad():
        assert term.pull(model).item() == 0.0
        model.lm_head.weight[2, 3] += step
        loss = term.pull(model).item()
    assert loss == pytest.approx(0.5 * term.fisher["lm_head.weight"][2, 3].item() * step**2)
    hidden = torch.ones(1, H)
    kl = kl_divergence(hidden, hidden, model.lm_head.weight, base.lm_head.weight).item()
    assert loss == pytest.approx(kl, rel=0.15)  # 400 squared gradients are known to 7 %


@pytest.mark.parametrize("kind", [EWC, EKFAC])
def test_a_pull_adds_the_weight_times_the_gradient_of_its_loss(kind: type[EWC]) -> None:
    base = Transformer(ModelConfig.minimind3(vocab_size=40, hidden_size=H, num_hidden_layers=1))
    base.initialise(0)
    term, model = kind(3.0), copy.deepcopy(base)
    base.requires_grad_(False)
    term.start(base, [], half=None)
    term.read(base, [document(9)])
    model.model.norm.weight.requires_grad_(False)
    name, losses = "model.layers.0.mlp.up_proj.weight", []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
        term.pull(model)
        gradient, added = model.get_parameter(name).grad, model.lm_head.weight.grad - 1.0
        assert gradient is not None and added.abs().max() > 0
        assert model.model.norm.weight.grad is None
        for step in (1.0, -2.0):  # to either side, along the gradient: the slope of a parabola is that of any chord
            model.get_parameter(name).add_(gradient / gradient.norm(), alpha=step)
            losses.append(term.pull(copy.deepcopy(model)).item())
    assert 3.0 * (losses[0] - losses[1]) / 2.0 == pytest.approx(gradient.norm().item(), rel=1e-3)


def test_a_pull_on_turned_gradients_is_the_same_pull_turned() -> None:
    base = Transformer(ModelConfig.minimind3(vocab_size=40, hidden_size=H, num_hidden_layers=1))
    base.initialise(0)
    base.requires_grad_(False)
    term, plain = EKFAC(3.0), copy.deepcopy(base).requires_grad_(True)
    term.start(base, [], half=None)
    term.read(base, [document(9)])
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        turned = copy.deepcopy(plain)
        assert torch.equal(term.pull(plain), term.pull_turned(turned))
        for (name, here), there in zip(plain.named_parameters(), turned.parameters(), strict=True):
            assert here.grad is not None and there.grad is not None
            expected = term.bases[name].turned(here.grad) if name in term.bases else here.grad
            torch.testing.assert_close(there.grad, expected, atol=1e-6, rtol=1e-4)
    assert len(term.bases) == 8


def test_drawn_tokens_follow_the_seed() -> None:
    fishers = [estimated(documents=3, length=9, seed=seed)[0].fisher["lm_head.weight"] for seed in (0, 0, 1)]
    assert torch.equal(fishers[0], fishers[1]) and not torch.equal(fishers[0], fishers[2])


def test_both_passes_over_the_text_see_the_same_tokens_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = Transformer(ModelConfig.minimind3(vocab_size=40, hidden_size=H, num_hidden_layers=1))
    base.initialise(0)
    base.requires_grad_(False)
    text = [document(9), document(5)]
    drawn, rand = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *args, **more: drawn.append(1) or rand(*args, **more))
    term, anew = EKFAC(), EKFAC()
    term.start(base, [], half=None)
    term.read(base, text)
    assert len(drawn) == len(text)
    anew.start(base, [], half=None)
    anew.bases = term.bases
    EWC.read(anew, base, text)
    assert all(torch.equal(term.fisher[name], anew.fisher[name]) for name in term.fisher)


def test_in_the_basis_the_loss_is_the_kl_along_a_direction_that_the_text_depends_on() -> None:
    base = Transformer(ModelConfig.minimind3(vocab_size=40, hidden_size=H, num_hidden_layers=1))
    base.initialise(0)
    with torch.no_grad():
        base.model.embed_tokens.weight.mul_(20.0)
    base.requires_grad_(False)
    draws = np.random.default_rng(3)
    text = [pack([(draws.integers(0, 40, 40), np.ones(40, bool))]) for _ in range(60)]
    name, losses = "model.layers.0.self_attn.o_proj.weight", []
    basis, moved = bases_of(Scores(base, text, 0))[name], copy.deepcopy(base).requires_grad_(True)
    assert basis.left is not None and basis.right is not None
    with torch.no_grad():  # the last eigenvectors are the text's largest
        moved.get_parameter(name).add_(torch.outer(basis.left[:, -1], basis.right[:, -1]), alpha=0.02)
    for term in (EKFAC(), EWC()):
        term.start(base, [], half=None)
        term.read(base, iter(text))
        with torch.no_grad():
            losses.append(term.pull(moved).item())
    inputs = [(one.batch.input_ids, *one.batch[2:]) for one in text]
    states, kept = (torch.cat([model.hidden(*one)[:-1] for one in inputs]) for model in (moved, base))
    kl = kl_divergence(states, kept, moved.lm_head.weight, base.lm_head.weight).item() / len(states)
    assert losses[0] == pytest.approx(kl, rel=0.3)
    assert losses[1] < 0.5 * kl  # along the weights' own axes most of it is off the diagonal


def test_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens of ewc are 0"):
        EWC(tokens=0)


# ---- through `fit`


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[dict[str, str]]]]:
    """The metrics of three steps without, with a weak and with a strong pull, and on text by the base."""
    folder, found = tmp_path_factory.mktemp("ewc"), {}
    text = f"--data.pretrain_path={DATA}/pretrain.jsonl"
    for name, kind, weight, more in (
        ("plain", None, 0, text), ("weak", "EWC", 1, text), ("strong", "EWC", 1e5, text), ("own", "EWC", 1e5, ""),
        ("basis", "EKFAC", 1e5, text),
    ):  # fmt: skip
        term = f"[{{class_path: minimind_sft.priors.{kind}, init_args: {{weight: {weight}, tokens: 1800}}}}]"
        arguments = [
            f"--run_dir={folder / name}", "--device=cpu", "--log_every_steps=1", "--export=none", "--val_every_steps=3",
            f"--model.weights={DATA}/base.pth", f"--data.train_path={DATA}/sft_train.jsonl", "--data.max_rows=48",
            f"--data.heldout_path={DATA}/heldout.jsonl", "--data.max_overlap=1.0", f"--data.cache_dir={folder}/cache",
            f"--data.tokenizer={DATA}/tokenizer", "--data.measure_documents=12", "--data.own_chats=0",
            "--data.batch_size=16", "--data.max_length=48", "--trainer.max_steps=3", "--model.learning_rate=2e-3",
            *([f"--model.terms={term}"] if kind else []), *([more] if more else []),
        ]  # fmt: skip
        assert main(["fit", *arguments]) == 0
        with open(folder / name / "metrics.csv", encoding="utf-8") as file:
            found[name] = list(csv.DictReader(file))
    yield found


def test_the_weight_changes_training_and_holds(runs: dict[str, list[dict[str, str]]]) -> None:
    forgotten = {name: float(rows[-1]["val/forgetting"]) for name, rows in runs.items()}
    assert forgotten["strong"] < 0.9 * forgotten["plain"] and forgotten["own"] < forgotten["plain"]
    assert forgotten["basis"] < 0.9 * forgotten["plain"]
    assert len({runs[name][-1]["train/loss"] for name in runs}) == 5
    assert len({runs[name][1]["train/loss"] for name in runs}) == 1  # the base is not pulled, and no text is replayed
    assert all(row["train/replay"] == "" for row in runs["strong"])
