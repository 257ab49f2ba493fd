"""The small pure parts of training and reporting: schedule, losses, meter, records, probes, tables."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minimind_sft import losses
from minimind_sft.chat import ChatTemplate
from minimind_sft.checkpoints import link
from minimind_sft.devices import pin_device
from minimind_sft.evaluation import OTHER_SOURCES, affordable_interval, sources_of
from minimind_sft.forgetting import CHAT, PRETRAIN, Meter, Reading, summary
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.module import SFTModule
from minimind_sft.optimizing import Optimization
from minimind_sft.probes import Probe, Reply, _space, ask, begins_with, compare, contains, load_probes
from minimind_sft.readings import read_metrics
from minimind_sft.records import MetricsFile
from minimind_sft.report import forgetting_table, ratio
from minimind_sft.schedule import learning_rate_at, peak_for
from minimind_sft.weights import export_minimind, load_model

DATA = Path(__file__).resolve().parents[1] / "data"


def test_the_schedule_is_the_originals() -> None:
    rates = [learning_rate_at(k, 12, peak=5e-4, warmup_ratio=0.0, min_lr_ratio=0.1) for k in (1, 6, 12)]
    assert rates == pytest.approx([0.0004923333109150403, 0.000275, 5e-05])


def test_warm_up_rises_in_even_steps_to_the_peak_and_the_cosine_ends_at_the_minimum() -> None:
    rates = [learning_rate_at(k, 10, peak=1.0, warmup_ratio=0.4, min_lr_ratio=0.2) for k in range(1, 11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[6] == pytest.approx(0.6)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_wider_models_get_a_lower_peak() -> None:
    peaks = [peak_for(width) for width in (48, 256, 512, 1024)]
    assert peaks == pytest.approx([1e-3, 1e-3, 1e-3 / 2**0.5, 5e-4])


def test_cross_entropy_is_a_sum_over_the_targets_only() -> None:
    states = torch.tensor([[0.0, math.log(3.0)], [5.0, -5.0], [0.0, 0.0]])  # the output layer passes them on
    nats = losses.cross_entropy(states, torch.tensor([1, -100, 0]), torch.tensor([0, 2]), torch.eye(2))
    assert nats.item() == pytest.approx(math.log(4 / 3) + math.log(2))


@pytest.mark.parametrize("rows", [2, 256])
def test_cross_entropy_has_the_value_and_the_gradients_of_autograds(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(losses, "rows_at_once", lambda vocab_size, device: rows)
    torch.manual_seed(0)
    weight, hidden = torch.randn(11, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    labels, targets = torch.randint(0, 11, (9,)), torch.tensor([0, 1, 2, 4, 5, 7, 8])
    expected = F.cross_entropy(F.linear(hidden[targets], weight), labels[targets], reduction="sum")
    nats = losses.cross_entropy(hidden, labels, targets, weight)
    torch.testing.assert_close(nats, expected)
    torch.testing.assert_close(
        torch.autograd.grad(3 * nats, (hidden, weight)), torch.autograd.grad(3 * expected, (hidden, weight))
    )
    with torch.no_grad():
        assert losses.cross_entropy(hidden, labels, targets, weight).item() == nats.item()


def test_what_is_frozen_gets_no_gradient() -> None:
    weight, hidden = torch.randn(11, 4), torch.randn(9, 4)
    labels, targets = torch.randint(0, 11, (9,)), torch.arange(9)
    for trained in (weight, hidden):
        trained.requires_grad_()
        losses.cross_entropy(hidden, labels, targets, weight).backward()
        assert trained.grad is not None and (hidden.grad is None or weight.grad is None)
        trained.requires_grad_(False)
        trained.grad = None


def test_under_autocast_matrices_are_multiplied_in_half_precision_and_gradients_are_the_parameters() -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(11, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    labels, targets = torch.randint(0, 11, (9,)), torch.arange(9)
    expected = F.cross_entropy(F.linear(hidden.bfloat16(), weight.bfloat16()).float(), labels, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        nats = losses.cross_entropy(hidden, labels, targets, weight)
    torch.testing.assert_close(nats, expected)
    found, wanted = (torch.autograd.grad(loss, (hidden, weight)) for loss in (nats, expected))
    assert all(gradient.dtype == torch.float32 for gradient in found)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


def test_no_target_is_a_loss_of_zero_with_a_gradient_of_zero() -> None:
    weight = torch.ones(3, 2, requires_grad=True)
    nats = losses.cross_entropy(torch.ones(1, 2), torch.tensor([-100]), torch.zeros(0, dtype=torch.int64), weight)
    nats.backward()
    assert nats.item() == 0.0 and weight.grad is not None and not weight.grad.any()


def test_the_meter_divides_sums_once() -> None:
    meter = Meter([CHAT, PRETRAIN])
    meter.update(0, torch.tensor(6.0), tokens=3, bytes=0)
    meter.update(0, torch.tensor(1.0), tokens=4, bytes=0)
    meter.update(1, torch.tensor(8 * math.log(2)), tokens=4, bytes=16)
    reading = meter.read(step=5)
    assert reading == Reading(
        5, chat_loss=1.0, pretrain_loss=pytest.approx(2 * math.log(2)), bits_per_byte=pytest.approx(0.5)
    )
    metrics = reading.metrics(Reading(0, pretrain_loss=1.0))
    assert metrics["val/forgetting"] == pytest.approx(2 * math.log(2) - 1)
    assert metrics["val/chat/perplexity"] == pytest.approx(math.e)
    assert "val/forgetting" not in reading.metrics(None)


def test_the_meter_knows_the_loss_of_every_source_of_the_text() -> None:
    meter = Meter([CHAT, PRETRAIN], ["poems", "sums"])
    meter.update(0, torch.tensor(6.0), tokens=3, bytes=0, source=1)  # of chats no source is told
    meter.update(1, torch.tensor(1.0), tokens=4, bytes=4, source=1)
    meter.update(1, torch.tensor(9.0), tokens=3, bytes=4, source=0)
    reading = meter.read(step=5)
    assert reading.by_source == {"poems": 3.0, "sums": 0.25}
    assert reading.pretrain_loss == pytest.approx(10 / 7) and reading.chat_loss == 2.0
    base = Reading(0, pretrain_loss=1.0, by_source={"poems": 2.5, "sums": 0.25})
    table = summary(base, reading, None, text="unseen", documents={"poems": 3, "sums": 9})
    assert [(row["source"], row["documents"], row["forgetting"]) for row in table["by_source"]] == [
        ("poems", 3, 0.5),
        ("sums", 9, 0.0),
    ]


def test_of_many_sources_the_smallest_are_taken_together() -> None:
    sources = np.concatenate([np.repeat(np.arange(39), 2), np.arange(39, 45)])  # 39 of two documents, six of one
    store = SimpleNamespace(meta={"sources": [f"source {n:02}" for n in range(45)]}, sources=sources)
    names, of = found = sources_of(SimpleNamespace(store=store, index=np.arange(len(sources))))  # type: ignore[arg-type]
    assert len(names) == 40 and found.counts["source 00"] == 2 and found.counts[OTHER_SOURCES] == 6
    assert [names[number] for number in of[-7:]] == ["source 38", *[OTHER_SOURCES] * 6]


def test_forgetting_is_after_minus_before() -> None:
    table = summary(Reading(0, 3.0, 2.0, 1.0), Reading(9, 1.0, 2.5, 1.2), Reading(6, 0.9, 2.25, 1.1), text="seen")
    assert table["forgetting"] == 0.5 and table["seen"] is True and table["best"]["step"] == 6
    text = forgetting_table(Reading(0, 3.0, 2.0, 1.0), Reading(9, 1.0, 2.5, 1.2), None, text="unseen")
    assert "+0.5000" in text and "unseen" in text and "20.1" in text  # exp(3)


def test_the_ratio_stands_beside_the_rule_of_thumb() -> None:
    assert ratio(10, 25_000, (1_000, 10_000)) == "1 : 2,500; the rule of thumb is 1 : 1,000 to 1 : 10,000"
    assert ratio(10, None, (1_000, 10_000)).startswith("unknown")


def test_a_look_is_afforded_for_a_twentieth_of_the_time() -> None:
    assert affordable_interval(3_000, 1_000.0) == 20
    assert affordable_interval(0, 1_000.0) == 1


def test_metrics_past_a_checkpoint_are_cut_and_half_rows_dropped(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        file.log_metrics({"train/loss": 1.0 / step, "lr": 0.1, "seconds": 1.0}, step=step)
        file.log_metrics({"val/chat/loss": 5.0}, step=step)
    file.save()
    assert [row["step"] for row in read_metrics(file.path)] == [1, 2, 3]
    assert read_metrics(file.path)[1] == {"step": 2, "train/loss": 0.5, "lr": 0.1, "val/chat/loss": 5.0, "seconds": 1.0}
    with open(file.path, "a", encoding="utf-8") as stream:
        stream.write("4,0.5,")
    file.cut_after(2)
    assert [row["step"] for row in read_metrics(file.path)] == [1, 2]


def test_a_user_s_loss_has_a_column_that_stays_when_the_run_resumes_without_it(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, ["mine", "replay"])
    file.log_metrics({"train/loss": 1.0, "train/mine": 0.5, "train/theirs": 0.1, "seconds": 1.0}, step=1)
    file.save()
    assert read_metrics(file.path) == [{"step": 1, "train/loss": 1.0, "train/mine": 0.5, "seconds": 1.0}]
    other = MetricsFile(tmp_path, ["another"])
    other.cut_after(1)
    other.log_metrics({"train/loss": 0.9, "train/another": 0.2, "seconds": 2.0}, step=2)
    other.save()
    first, second = read_metrics(file.path)
    assert first["train/mine"] == 0.5 and second["train/another"] == 0.2 and "train/mine" not in second
    assert file.path.read_text(encoding="utf-8").splitlines()[0].endswith("tokens_per_second,seconds")


def test_a_link_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_text("new")
    (tmp_path / "best.ckpt").write_text("old")
    link(tmp_path / "last.ckpt", "best.ckpt")
    assert (tmp_path / "best.ckpt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize(
    ("reply", "answer", "begins", "holds"),
    [
        ("Lima.", "Lima", True, True),
        ("Limassol.", "Lima", False, False),
        ("It is Lima!", "Lima", False, True),
        ("12", "1", False, False),
        ("是利马。", "利马", False, True),
        ("利马是", "利马", True, True),
        ("a Lima, b Limassol", "Lima", False, True),
        ("Malé.", "Mal", False, False),
        ("Malé是", "Malé", True, True),
        ("3.", "3", True, True),
        ("3, 5 and 7", "3", True, True),
        ("3.5 million people", "3", False, False),
        ("12,500 m", "12", False, False),
        ("It has 12,500 people.", "500", False, False),
        ("about 1.5 km", "5", False, False),
        ("It was in 1949,共和国", "1949", False, True),
    ],
)
def test_an_answer_counts_as_whole_words(reply: str, answer: str, begins: bool, holds: bool) -> None:
    assert (begins_with(reply, answer), contains(reply, answer)) == (begins, holds)


@pytest.mark.parametrize(
    ("prompt", "between"),
    [("The capital is", " "), ("A capital do Peru é", " "), ("Столица Перу это", " "), ("페루의 수도는", " "),
     ("秘鲁的首都是", ""), ("首都：", ""), ("Capital: ", "")],
)  # fmt: skip
def test_an_answer_stands_behind_a_space_but_not_in_chinese(prompt: str, between: str) -> None:
    assert _space(prompt) == between


def test_losses_are_named() -> None:
    probes = [Probe("p", "q", "Lima", "capital of Peru", False), Probe("p", "q", "Rome", "capital of Italy", True)]
    right, wrong = Reply("Lima", True, "Lima", True), Reply("Quito", False, "?", False)
    result = compare(probes, [right, wrong], [wrong, right])
    group = {"probes": 1, "before": 1, "after": 0, "kept": 0, "lost": 1, "gained": 0}
    assert result["groups"]["raw/not_in_sft"] == group
    assert result["lost"][0]["name"] == "capital of Peru" and result["lost"][0]["said"] == "Quito"
    assert [row["name"] for row in result["gained"]] == ["capital of Italy"] * 2


def test_a_bad_probe_is_named(tmp_path: Path) -> None:
    (tmp_path / "probes.jsonl").write_text('{"prompt": "a", "question": "b", "answer": "c"}\n{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"probes.jsonl:2: not a probe .*no text as answer"):
        load_probes([tmp_path / "probes.jsonl"])


def test_probes_of_several_files_are_asked_without_a_question_by_their_prompt_and_none_twice(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"prompt": "The capital of Peru is", "answer": " Lima"}\n')
    second.write_text('{"prompt": "1 + 1 =", "question": "1 + 1?", "answer": "2"}\n')
    peru, sum_ = load_probes([first, second])
    assert (peru.question, peru.answer) == ("The capital of Peru is", "Lima")
    assert sum_.question == "1 + 1?"
    with pytest.raises(ValueError, match=r"b.jsonl:1: the probe of .*b.jsonl:1 again"):
        load_probes([second, second])


def test_a_model_chooses_the_answer_that_it_knows_among_distractors_in_both_ways(tmp_path: Path) -> None:
    asked = {"prompt": "The capital of Poland is", "question": "What is the capital of Poland?"}
    rows = [
        asked | {"answer": "Warsaw", "distractors": ["Santiago", "Sarajevo", "Bissau"]},
        asked | {"answer": "Bissau", "distractors": ["Santiago", "Warsaw", "Warsaw II"]},  # one begins another
        asked | {"answer": "Santiago"},
    ]
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    probes = load_probes([tmp_path / "probes.jsonl"])
    template = ChatTemplate.from_folder(DATA / "tokenizer")
    replies = ask(load_model(DATA / "base.pth")[0], template, probes, document_format="minimind3")
    assert [(reply.raw_choice, reply.raw_choice_right) for reply in replies] == [
        ("Warsaw", True),
        ("Warsaw", False),
        ("", False),
    ]
    assert replies[0].chat_choice in ("Warsaw", "Santiago", "Sarajevo", "Bissau")  # it has never seen a chat
    groups = compare(probes, replies, replies)["groups"]
    counts = {way.removesuffix("/not_in_sft"): group["probes"] for way, group in groups.items()}
    assert counts == {"raw": 3, "chat": 3, "raw_choice": 2, "chat_choice": 2}
    assert groups["raw_choice/not_in_sft"]["kept"] == 1
    broken = load_model(DATA / "base.pth")[0]
    torch.nn.init.constant_(broken.model.norm.weight, math.nan)
    assert not any(reply.raw_choice_right for reply in ask(broken, template, probes, document_format="minimind3"))
    with pytest.raises(ValueError, match="the answer 'a' is among its distractors"):
        (tmp_path / "probes.jsonl").write_text('{"prompt": "p", "answer": "a", "distractors": ["b", "a"]}\n')
        load_probes([tmp_path / "probes.jsonl"])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = Transformer(ModelConfig.minimind3(hidden_size=32, num_hidden_layers=1, vocab_size=64))
    model.initialise(0)
    export_minimind(model, tmp_path / "base.pth")
    return tmp_path / "base.pth"


def test_decay_spares_norms_unless_asked(base: Path) -> None:
    model = SFTModule(weights=str(base)).model
    for decay_all, decay_of_norms in ((False, 0.0), (True, 0.1)):
        settings = Optimization(5e-4, warmup_ratio=0.0, min_lr_ratio=0.1, weight_decay=0.1, decay_all=decay_all)
        groups = settings.adamw(model, torch.device("cpu"), half=False, scaled=False).param_groups
        found = [({p.ndim for p in group["params"]}, group["weight_decay"]) for group in groups]
        assert found == [({2}, 0.1), ({1}, decay_of_norms)]


def test_reset_head_leaves_the_embedding_and_unties(base: Path) -> None:
    plain, fresh = SFTModule(weights=str(base)), SFTModule(weights=str(base), reset_head=True)
    assert torch.equal(plain.model.model.embed_tokens.weight, fresh.model.model.embed_tokens.weight)
    assert not torch.equal(fresh.model.lm_head.weight, plain.model.lm_head.weight)
    assert fresh.model.num_parameters() == plain.model.num_parameters() + 64 * 32


def test_a_shape_that_contradicts_the_weights_is_an_error(base: Path) -> None:
    with pytest.raises(ValueError, match=r"model.hidden_size is 64, but .* has 32"):
        SFTModule(weights=str(base), hidden_size=64)


def test_a_kind_of_device_can_be_counted_and_a_numbered_one_cannot() -> None:
    assert pin_device("cpu", "auto", "auto") == {"accelerator": "cpu", "devices": 1}
    assert pin_device("cpu", "auto", 2) == {"accelerator": "cpu", "devices": 2}
    for device, accelerator, devices in (("cuda:1", "auto", 2), ("cpu", "gpu", 1)):
        with pytest.raises(ValueError, match="both set"):
            pin_device(device, accelerator, devices)
