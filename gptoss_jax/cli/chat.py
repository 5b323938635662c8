"""`gptoss-jax chat`: a conversation on the terminal, or on a pipe, one question a line."""

import os
import sys
from typing import Annotated, Any, Literal

import tyro

from gptoss_jax.cli.generate import Effort, open_model, system_message

HELP = "/reset forgets the conversation, /system TEXT sets instructions (no TEXT: none), /effort low|medium|high|none, /quit or Ctrl-D ends"


def chat(
    checkpoint: Annotated[str, tyro.conf.Positional],
    developer: str | None = None,
    reasoning_effort: Effort | None = None,
    max_new_tokens: int = 1024,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    packed: bool = False,
) -> None:
    """Talk to a model. Thoughts are dimmed; Ctrl-C stops an answer, Ctrl-D ends. /help lists the commands inside.

    Works on a pipe too: one question a line, thoughts marked with [analysis]. Earlier thoughts are not shown to the model again, as in training.

    Args:
        checkpoint: HF directory (MXFP4 or BF16), OpenAI's original layout, training checkpoint, hub id, or "nano".
        developer: instructions of the developer message.
        reasoning_effort: writes the release's system message with it and today's date; "none" writes none. By default "medium" for models with the
            release's vocabulary, "none" for others.
        max_new_tokens: at most so many for each answer.
        temperature: 0 takes the most probable token.
        top_k: draw from so many of the most probable tokens.
        top_p: draw from the fewest tokens that have this probability together.
        seed: of all draws.
        dtype: of weights, activations and cache.
        packed: keep the experts of an MXFP4 checkpoint as 4-bit codes in memory: less memory; on a CPU slower.
    """
    from gptoss_jax.evaluation.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    model, tokenizer, generator = open_model(checkpoint, dtype, packed)
    talk = Conversation(generator, tokenizer, model.config.vocab_size, sampling, max_new_tokens, developer, reasoning_effort)
    if sys.stdin.isatty():
        try:
            import readline  # noqa: F401  (gives input() editing and a history)
        except ImportError:
            pass
        print(HELP)
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:  # at the prompt: a line that is not wanted after all
            print()
            continue
        if line == "/quit":
            return
        if line.startswith("/"):
            print(talk.command(line))
        elif line:
            talk.ask(line)


class Printer:
    """Streams an answer: `feed` every token, `close` at its end."""

    def __init__(self, tokenizer: Any):
        from gptoss_jax.evaluation.answers import AnswerParser, TokenStream

        self.stream, self.parser = TokenStream(tokenizer), AnswerParser()
        self.styled = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self.open = ""

    def feed(self, token: int) -> None:
        self._show(self.stream.feed(token))

    def close(self):
        """The answer, as far as it was written."""
        self._show(self.stream.flush())
        answer = self.parser.finish()
        if self.open:
            self._write("\033[0m\n" if self.styled else "\n")
        elif answer.final:  # without a header: only its end tells that it was an answer
            print(answer.final)
        return answer

    def _show(self, pieces) -> None:
        for delta in (delta for piece in pieces for delta in self.parser.feed(*piece)):
            if delta.opens:
                self._write("\n" if self.open else "")
                dim = delta.channel != "final"
                if self.styled:
                    self._write("\033[2m" if dim else "\033[0m")
                elif dim:
                    self._write(f"[{delta.channel}] ")
                self.open = delta.channel
            self._write(delta.text)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class Conversation:
    """What was said so far, and how to go on."""

    def __init__(self, generator, tokenizer, vocab_size, sampling, max_new_tokens, developer, effort):
        from gptoss_jax.data import HarmonyEncoder

        self.generator, self.tokenizer, self.encoder = generator, tokenizer, HarmonyEncoder(tokenizer)
        self.vocab_size, self.sampling, self.max_new_tokens = vocab_size, sampling, max_new_tokens
        self.developer, self.effort = developer, effort
        self.messages: list[dict[str, str]] = []
        self.turns = 0

    def command(self, line: str) -> str:
        """Carries out a line that begins with "/"; what to say about it."""
        name, _, text = line.partition(" ")
        text = text.strip()
        if name == "/reset":
            self.messages.clear()
            return "(forgotten)"
        if name == "/system":
            self.developer = text or None
            return "(instructions set)" if text else "(no instructions)"
        if name == "/effort" and text in ("low", "medium", "high", "none"):
            self.effort = text
            return f"(reasoning effort: {text})"
        return HELP

    def ask(self, question: str) -> None:
        """Prints the answer as it comes. An answer that is stopped counts as far as it got; one without a final text leaves no trace."""
        import dataclasses

        from gptoss_jax.data import render
        from gptoss_jax.errors import UsageError
        from gptoss_jax.evaluation.generate import stop_ids

        self.messages.append({"role": "user", "content": question})
        instructions = [{"role": "developer", "content": self.developer}] if self.developer else []
        pieces = render([*instructions, *self.messages], system=system_message(self.vocab_size, self.effort), prompt=True)
        prompt = self.encoder.encode([pieces])[0].ids
        printer = Printer(self.tokenizer)
        sampling = dataclasses.replace(self.sampling, seed=(self.sampling.seed + self.turns) % 2**32)  # the same question again is drawn anew
        self.turns += 1
        try:
            self.generator.generate([prompt], self.max_new_tokens, stop_ids(self.tokenizer), sampling, lambda _, token: printer.feed(token))
            note = "(cut: the answer reached its length limit)"
        except KeyboardInterrupt:
            note = "(stopped)"
        except UsageError as error:
            self.messages.pop()
            print(f"{error}; /reset forgets the conversation")
            return
        answer = printer.close()
        for call in answer.calls:
            print(f"[call to {call.recipient}] {call.arguments}")
        if not answer.stopped:
            print(note)
        if answer.final.strip():
            self.messages.append({"role": "assistant", "content": answer.final})
        else:
            self.messages.pop()
