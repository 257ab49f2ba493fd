"""`python -m minimind_sft chat WEIGHTS`: lines in, answers out, on a terminal or in a pipe.

On a terminal: a banner, a prompt, answers as they are written; Ctrl-C stops an answer and not the program. In a pipe:
one answer per input line and nothing else on standard output. There an answer is one line (a line break in it is
written `\\n`), so that line 7 of the output answers line 7 of the input; `/reset` and `/exit` have no answer.
Lightning is not imported: an answer of the demo's model takes 2.7 s of processor time, nearly all for importing torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, TextIO

from minimind_sft.options import OptionParser, add_left_open, errors_name_options, left_open
from minimind_sft.origins import find_origin
from minimind_sft.report import no_more_output

if TYPE_CHECKING:
    from minimind_sft.dialogue import Dialogue

Answer = Callable[[str], Generator[str, None, None]]
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
COMMANDS = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"


def parser() -> OptionParser:
    """The command line of `chat`."""
    parser = OptionParser("chat", "Talk to a model. In a pipe: one answer per input line. " + COMMANDS + ".")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="where the weights' folder or run does not tell")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--temperature", type=float, default=0.85, help="of the sampling; 0 is greedy (default: 0.85)")
    how.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--top_p", type=float, default=0.95, help="sample within this probability (default: 0.95)")
    parser.add_argument("--top_k", type=int, default=0, help="sample among so many tokens; 0 for all (default: 0)")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="length of an answer at most (default: 512)")
    parser.add_argument("--seed", type=int, default=42, help="of the sampling (default: 42)")
    parser.add_argument("--raw", action="store_true", help="go on with raw text, without chat template and memory")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default: auto)")
    add_left_open(parser)
    parser.add_argument(
        "--inference_rope_scaling", action="store_true", help="read 16 times further than trained (MiniMind's YaRN)"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: weights, tokenizer or settings that cannot be used.
    """
    options = parser().parse_args(list(argv))
    if options.raw and options.system is not None:
        raise ValueError("--raw goes on with plain text, which has no --system prompt; leave one of them out")
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # bytes that are no text are no reason to stop
            stream.reconfigure(errors="replace")
    on_terminal = options.prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    dialogue, answer, banner = _open(options)
    print(banner if on_terminal else banner.splitlines()[0], file=sys.stdout if on_terminal else sys.stderr, flush=True)
    try:
        if options.prompt is not None:
            _show(answer(_text(options.prompt)), sys.stdout)
        elif on_terminal:
            _talk(dialogue, answer)
        else:
            _serve(dialogue, answer)
        sys.stdout.flush()
    except BrokenPipeError:
        no_more_output()
    return 0


def _open(options: Any) -> tuple[Dialogue, Answer, str]:
    """The conversation, the function that answers a line, and the banner."""
    origin = find_origin(options.weights)
    folder = origin.tokenizer(options.tokenizer)

    from minimind_sft import weights
    from minimind_sft.chat import ChatTemplate
    from minimind_sft.devices import one_device
    from minimind_sft.dialogue import Dialogue
    from minimind_sft.generate import Sampling

    temperature = 0.0 if options.greedy else options.temperature
    sampling = Sampling(temperature, options.top_k or None, options.top_p, options.seed)
    device = one_device(options.device)
    template = ChatTemplate.from_folder(folder)
    with errors_name_options():
        loaded = weights.load(
            origin.path, **left_open(options), inference_rope_scaling=options.inference_rope_scaling
        )
    weights.check_vocab(template.vocab_size, loaded.config, key="--tokenizer")
    dialogue = Dialogue(
        weights.build(loaded).to(device),
        template,
        sampling=sampling,
        max_new_tokens=options.max_new_tokens,
        system=options.system,
    )
    top_k = f", top_k {options.top_k}" if options.top_k else ""
    how = f"temperature {temperature:g}, top_p {options.top_p:g}{top_k}" if temperature else "greedy"
    banner = f"{loaded.describe()}\ntokenizer {folder}, {how}, {device}\n{COMMANDS}"
    if not options.raw:
        return dialogue, dialogue.ask, banner
    framed = origin.setting("data", "document_format") != "bare"
    return dialogue, lambda text: dialogue.continue_text(text, framed=framed), banner


def _talk(dialogue: Dialogue, answer: Answer) -> None:
    """On a terminal, until /exit or Ctrl-D."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (gives `input` its history and editing)

    while True:
        try:
            line = _text(input("\n> "))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # meant for an answer that had just ended
            print("\n(/exit or Ctrl-D leaves)")
            continue
        if line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            dialogue.reset()
            print("(forgotten)")
        elif line.strip():
            try:
                _show(answer(line), sys.stdout)
                if dialogue.cut:
                    print(f"(cut at {dialogue.max_new_tokens} tokens; --max_new_tokens)")
            except KeyboardInterrupt:
                print("\n(stopped)")


def _serve(dialogue: Dialogue, answer: Answer) -> None:
    """In a pipe, until /exit or the end of the input."""
    one_line = not sys.stdout.isatty()
    for line in sys.stdin:
        line = _text(line.rstrip("\r\n"))
        if line.strip() == "/exit":
            return
        if line.strip() == "/reset":
            dialogue.reset()
        else:  # an empty line has an empty answer, so that lines stay in step
            _show(answer(line) if line.strip() else _nothing(), sys.stdout, one_line=one_line)


def _nothing() -> Generator[str, None, None]:
    yield from ()


def _show(pieces: Generator[str, None, None], stream: TextIO, *, one_line: bool = False) -> None:
    """Print an answer as it comes, and end its line."""
    terminal = stream.isatty()
    with closing(pieces):  # a stopped answer is kept as far as it went
        for piece in pieces:
            if one_line:
                piece = piece.replace("\r", "\\r").replace("\n", "\\n")
            stream.write(piece.translate(_CONTROL) if terminal else piece)
            stream.flush()
    stream.write("\n")
    stream.flush()


def _text(line: str) -> str:
    """Valid text of what the command line or a terminal gave."""
    return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
