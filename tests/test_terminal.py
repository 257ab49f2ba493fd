"""The verb `chat`: lines in, answers out."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minimind_sft import terminal
from minimind_sft.__main__ import main
from minimind_sft.chat import ChatTemplate
from minimind_sft.devices import one_device
from minimind_sft.generate import generate
from minimind_sft.huggingface import export_hf
from minimind_sft.model import Transformer
from minimind_sft.model_config import ModelConfig
from minimind_sft.weights import export_minimind

PROJECT = Path(__file__).resolve().parents[1]
TOKENIZER = PROJECT / "data" / "tokenizer"
SHORT = ("--greedy", "--max_new_tokens=8", "--device=cpu")


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig.minimind3(hidden_size=32, num_hidden_layers=2, vocab_size=2560, intermediate_size=48)
    model = Transformer(config)
    model.initialise(seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * (8.0 if parameter.ndim > 1 else 1.1)).half())
    return model


@pytest.fixture(scope="module")
def folder(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    export_hf(model, folder, tokenizer=TOKENIZER, card="")
    return folder


class Input(io.StringIO):
    """Lines typed on a terminal, or piped in."""

    def __init__(self, text: str, *, terminal: bool = False) -> None:
        super().__init__(text)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def say(monkeypatch: pytest.MonkeyPatch, lines: str, *argv: str) -> int:
    monkeypatch.setattr(sys, "stdin", Input(lines))
    return main(["chat", *argv])


def answers(model: Transformer, *conversations: list[str]) -> list[str]:
    """Greedy answers to the last message of each conversation, without a cache of earlier turns."""
    template = ChatTemplate.from_folder(TOKENIZER)
    said = []
    for turns in conversations:
        roles = ["user", "assistant"] * len(turns)
        messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
        (ids,) = generate(model, [template.prompt(messages)], max_new_tokens=8, stop_ids=template.stop_ids)
        said.append(template.decode([id for id in ids if id not in template.stop_ids]))
    return said


def test_in_a_pipe_every_line_has_one_line_and_nothing_else_is_printed(
    model: Transformer, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = answers(model, ["Hi"], ["Who?"])
    (second,) = answers(model, ["Hi", first, "Who?"])
    assert second != other  # what was said before matters
    assert say(monkeypatch, "Hi\nWho?\n\n/reset\nWho?\n/exit\nHi\n", str(folder), *SHORT) == 0
    printed = capsys.readouterr()
    wanted = [text.rstrip("\ufffd").replace("\n", "\\n") for text in (first, second, "", other)]
    assert printed.out == "".join(f"{line}\n" for line in wanted)
    assert printed.err.count("\n") == 1 and str(folder) in printed.err and "2560" in printed.err


def test_line_breaks_are_escaped_for_pipes_only_and_control_characters_for_terminals_only() -> None:
    def shown(*, one_line: bool = False, on_terminal: bool = False) -> str:
        stream = Input("", terminal=on_terminal)
        terminal._show((piece for piece in ("a\n", "b\r\x1b[2Jc\t")), stream, one_line=one_line)
        return stream.getvalue()

    assert shown(one_line=True) == "a\\nb\\r\x1b[2Jc\t\n"
    assert shown(on_terminal=True) == "a\nb[2Jc\t\n"
    assert shown() == "a\nb\r\x1b[2Jc\t\n"


def test_lines_of_the_output_stay_in_step_with_those_of_the_input(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minimind_sft.dialogue.Dialogue.ask", lambda _, text: (piece for piece in (text, "\n", "b")))
    assert say(monkeypatch, "1\n2\n", str(folder), *SHORT) == 0
    assert capsys.readouterr().out == "1\\nb\n2\\nb\n"
    assert say(monkeypatch, "", str(folder), "--prompt=1", *SHORT) == 0
    assert capsys.readouterr().out == "1\nb\n"


def test_a_prompt_is_answered_as_it_is(
    model: Transformer, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert say(monkeypatch, "not read\n", str(folder), "--prompt", "Hi", *SHORT) == 0
    assert capsys.readouterr().out == answers(model, ["Hi"])[0].rstrip("\ufffd") + "\n"


def test_every_option_changes_the_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(*argv: str) -> str:
        assert say(monkeypatch, "", str(folder), "--prompt", "Hi", "--max_new_tokens=8", *argv) == 0
        return capsys.readouterr().out

    plain = answer()
    assert answer() == plain
    hot = ("--temperature=3", "--top_p=1")
    different = [
        ("--seed=43",), ("--temperature=3",), hot, (*hot, "--top_k=2"), (*hot, "--top_p=0.3"), ("--system=Be brief.",),
        ("--raw",), ("--max_new_tokens=2",),
    ]  # fmt: skip
    said = [answer(*argv) for argv in different]
    assert len({plain, *said}) == 1 + len(different)
    greedy = answer("--greedy")
    assert greedy == answer("--temperature=0") == answer("--top_k=1") == answer("--top_p=1e-6")
    assert greedy != plain


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_banner_and_commands(
    model: Transformer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["Hi", "/reset", "  ", "Hi", "/exit", "never read"])
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))
    screen = Terminal()
    monkeypatch.setattr(sys, "stdin", Input("", terminal=True))
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["chat", str(folder), *SHORT]) == 0
    said = screen.getvalue()
    banner, *rest = said.split("leaves, Ctrl-C stops an answer\n")
    assert "qwen3, 0.10 M parameters" in banner and "greedy, cpu" in banner and "/reset" in banner
    answer = answers(model, ["Hi"])[0].rstrip("\ufffd").translate(terminal._CONTROL)
    cut = "(cut at 8 tokens; --max_new_tokens)\n"
    assert rest == [f"{answer}\n{cut}(forgotten)\n{answer}\n{cut}"]
    assert next(lines) == "never read"


def test_ctrl_c_stops_an_answer_and_never_the_program(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["Hi", KeyboardInterrupt, "Hi", EOFError])

    def type_line(_prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr("minimind_sft.dialogue.Characters.add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    screen = Terminal()
    monkeypatch.setattr(sys, "stdin", Input("", terminal=True))
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["chat", str(folder), *SHORT]) == 0
    assert screen.getvalue().endswith("an answer\n\n(stopped)\n\n(/exit or Ctrl-D leaves)\n\n(stopped)\n\n")


def test_bare_weights_need_a_tokenizer_and_may_need_their_heads(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w_32.pth"
    export_minimind(model, path)
    assert say(monkeypatch, "Hi\n", str(path), *SHORT) == 2
    assert "--tokenizer FOLDER" in capsys.readouterr().err
    assert say(monkeypatch, "Hi\n", str(path), "--tokenizer", str(TOKENIZER), *SHORT) == 0
    assert capsys.readouterr().out == answers(model, ["Hi"])[0].rstrip("\ufffd").replace("\n", "\\n") + "\n"
    config = ModelConfig.minimind2(hidden_size=32, num_hidden_layers=1, vocab_size=2560, num_attention_heads=4)
    export_minimind(Transformer(config), path)
    tokenizer = ("--tokenizer", str(TOKENIZER))
    assert say(monkeypatch, "", str(path), *tokenizer, *SHORT) == 0
    assert "taken as default: 8 attention heads" in capsys.readouterr().err
    assert say(monkeypatch, "", str(path), *tokenizer, "--num_attention_heads=4", *SHORT) == 0
    assert "4 heads (2 kv)" in capsys.readouterr().err
    assert say(monkeypatch, "", str(path), *tokenizer, "--inference_rope_scaling", *SHORT) == 0
    assert "RoPE scaling yarn" in capsys.readouterr().err


def test_one_device_is_chosen_by_the_names_of_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert one_device("cpu") == torch.device("cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    names = {"auto": "cuda:0", "cuda": "cuda:0", "cuda:1": "cuda:1"}
    assert {name: str(one_device(name)) for name in names} == names
    with pytest.raises(ValueError, match="one is needed here, such as cuda:0"):
        one_device("cuda:0,1")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "WEIGHTS"),
        (["nowhere.pth", "--tokenizer", str(TOKENIZER)], "weights nowhere.pth do not exist"),
        (["FOLDER", "--tokenizer", "nowhere"], "nowhere has no tokenizer.json"),
        (["FOLDER", "--temperatur=1"], "did you mean --temperature?"),
        (["FOLDER", "--temperature=-1"], "temperature is -1.0"),
        (["FOLDER", "--greedy", "--temperature=1"], "not allowed with"),
        (["FOLDER", "--top_p=2"], "top_p is 2.0"),
        (["FOLDER", "--max_new_tokens=0"], "max_new_tokens is 0"),
        (["FOLDER", "--device=cuda:99"], "--device cpu"),
        (["FOLDER", "--raw", "--system=x"], "--system"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    argv = [str(folder) if word == "FOLDER" else word for word in argv]
    assert say(monkeypatch, "Hi\n", *argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("minimind_sft: error: ") and said.count("\n") == 1 and says in said, said


def test_a_small_tokenizer_s_model_is_refused_a_larger_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig.minimind3(hidden_size=32, num_hidden_layers=1, vocab_size=50)
    export_minimind(Transformer(config), tmp_path / "w.pth")
    assert say(monkeypatch, "Hi\n", str(tmp_path / "w.pth"), "--tokenizer", str(TOKENIZER)) == 2
    assert "tokenizer has 2560 tokens" in (said := capsys.readouterr().err) and "--tokenizer at" in said


def test_a_pipe_in_a_process_of_its_own_without_lightning(model: Transformer, folder: Path) -> None:
    code = (
        "import sys; from minimind_sft.__main__ import main; code = main(sys.argv[1:]); "
        "print({'lightning', 'transformers', 'pandas'} & set(sys.modules), file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "chat", str(folder), *SHORT]
    done = subprocess.run(command, input=b"Hi\n\xff", capture_output=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.decode().splitlines()[-1] == "set()"
    lines = done.stdout.decode().split("\n")
    assert lines[0] == answers(model, ["Hi"])[0].rstrip("\ufffd").replace("\n", "\\n") and len(lines) == 3
